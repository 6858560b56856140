"""Folders whose weights are stored in FP8 with scales of blocks, or in MXFP4."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8_MAX = 448.0
MXFP4_BLOCK = 32  # weights with one scale


def fp8_blocks(weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A weight in FP8, and a scale for each block; blocks at the edge are smaller."""
    rows, columns = (-(-weight.shape[0] // height), -(-weight.shape[1] // width))
    scales = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = weight[part].abs().max() / FP8_MAX
            values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def store_in_fp8(folder: Path, height: int = 32, width: int = 32) -> Path:
    """Stores the projections of a model folder as DeepSeek-V3 is published."""
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("_proj.weight")]:
        values, scales = fp8_blocks(state.pop(name).float(), height, width)
        state |= {name: values, f"{name}_scale_inv": scales}
    section = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [height, width]}
    return _write(folder, state, section | {"activation_scheme": "dynamic"})


def store_in_mxfp4(folder: Path) -> Path:
    """Replaces the experts of a gpt-oss folder by random ones in MXFP4, as it is published."""
    state = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [n for n in state if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        blocks = (experts, rows, columns // MXFP4_BLOCK)
        codes = torch.randint(0, 256, (*blocks, 16), generator=draw, dtype=torch.uint8)
        state[f"{name}_blocks"] = codes
        # The exponent is the byte - 127; the 4-bit numbers go up to 6.
        state[f"{name}_scales"] = torch.full(blocks, 122, dtype=torch.uint8)
    return _write(folder, state, {"quant_method": "mxfp4"})


def _write(folder: Path, state: dict[str, Tensor], section: dict[str, Any]) -> Path:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return folder
