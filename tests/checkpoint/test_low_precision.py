"""Weights that are stored in FP8 or FP4 are read as float, tensor by tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo
from low_precision import fp8_blocks
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lowbit
from lowbit.checkpoint import CheckpointReader, open_checkpoint
from lowbit.checkpoint.output import size_of
from lowbit.methods import RTN

pytestmark = pytest.mark.slow

Parts = dict[str, Tensor]


def fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in bytes with two FP4 codes each, and a power of two for each 32 of them."""
    exponents = torch.randint(-3, 2, (weight.shape[0], weight.shape[1] // 16))
    codes = torch.randint(0, 256, (weight.shape[0], weight.shape[1] // 2), dtype=torch.uint8)
    return codes.view(torch.int8), torch.exp2(exponents.float() - 2).to(torch.float8_e8m0fnu)


STORED: dict[str, tuple[Callable[[Tensor], Parts], dict[str, Any], str]] = {
    "DeepSeek-V3's blocks": (
        lambda w: dict(zip(("weight", "weight_scale_inv"), fp8_blocks(w, 32, 20), strict=True)),
        {"quant_method": "fp8", "weight_block_size": [32, 20]},
        "FP8 with scales of blocks of 32 x 20",
    ),
    "blocks that fit": (
        lambda w: dict(zip(("weight", "weight_scale_inv"), fp8_blocks(w, 8, 16), strict=True)),
        {"quant_method": "fp8", "weight_block_size": [8, 16]},
        "FP8 with scales of blocks of 8 x 16",
    ),
    "one scale, and one of the inputs": (
        lambda w: {
            "weight": fp8_blocks(w, *w.shape)[0],
            "weight_scale_inv": fp8_blocks(w, *w.shape)[1].reshape(()),
            "activation_scale": torch.tensor(0.5),
        },
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        "FP8 with one scale per tensor",
    ),
    "a scale for each row": (
        lambda w: dict(zip(("weight", "weight_scale"), fp8_blocks(w, 1, w.shape[1]), strict=True)),
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "FP8 with one scale per row",
    ),
    "FP4 with E8M0": (
        lambda w: dict(zip(("weight", "scale"), fp4(w), strict=True)),
        {"quant_method": "fp8"},
        "FP4",
    ),
}


def store(name: str, folder: Path) -> tuple[Path, Path]:
    """The Llama of the zoo in low precision, and the float model that it stands for."""
    torch.manual_seed(0)
    make, section, _ = STORED[name]
    low = quantized.add_tokenizer(zoo.write(zoo.ZOO["llama"], folder / "low", torch.bfloat16))
    dense = quantized.add_tokenizer(zoo.write(zoo.ZOO["llama"], folder / "dense", torch.bfloat16))
    state, floats = load_file(low / "model.safetensors"), {}
    for key in [key for key in state if "_proj" in key]:
        weight = state.pop(key).float()
        parts = make(weight)
        state |= {f"{key.removesuffix('.weight')}.{part}": t for part, t in parts.items()}
        values, scale = (part for part in parts if part != "activation_scale")
        floats[key] = by_hand(parts[values], parts[scale], weight.shape, section)
    save_file(state, low / "model.safetensors", metadata={"format": "pt"})
    state = load_file(dense / "model.safetensors") | floats
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((low / "config.json").read_text())
    (low / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return low, dense


def by_hand(values: Tensor, scale: Tensor, shape: torch.Size, section: Any) -> Tensor:
    out = torch.empty(shape)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    height, width = section.get("weight_block_size") or (1, 16 if scale.shape[-1:] > (1,) else 0)
    for i in range(shape[0]):
        for j in range(shape[1]):
            if values.dtype == torch.int8:
                byte = int(values[i, j // 2]) & 255
                value = table[byte & 15] if j % 2 == 0 else table[byte >> 4]
            else:
                value = float(values[i, j])
            at = scale[i // height, j // width if width else 0] if scale.dim() else scale
            out[i, j] = value * float(at)
    return out.to(torch.bfloat16)


@pytest.mark.parametrize("name", STORED)
def test_read_as_float(name: str, tmp_path: Path) -> None:
    low, dense = store(name, tmp_path)
    reader, wanted = open_checkpoint(low), CheckpointReader(dense)
    assert {n: (i.shape, i.dtype) for n, i in reader.tensors.items()} == {
        n: (i.shape, i.dtype) for n, i in wanted.tensors.items()
    }
    found, floats = reader.read(reader.tensors), wanted.read(wanted.tensors)
    assert all(torch.equal(found[n], floats[n]) for n in floats)
    kind = STORED[name][2]
    assert reader.dequantized == {kind: 14}
    assert size_of(low).bytes < size_of(dense).bytes
    outs = [lowbit.quantize(m, tmp_path / f"out-{m.name}", RTN(bits=4)) for m in (low, dense)]
    shards = [load_file(p) for out in outs for p in sorted(out.glob("*.safetensors"))]
    for one, other in zip(shards[: len(shards) // 2], shards[len(shards) // 2 :], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    report = json.loads((outs[0] / "report.json").read_text())
    assert report["dequantized"] == {kind: 14}
    assert "dequantized" not in json.loads((outs[1] / "report.json").read_text())


@pytest.mark.exhaustive
@pytest.mark.slow
def test_as_the_reference_and_as_a_whole(tmp_path: Path) -> None:
    low, dense = store("blocks that fit", tmp_path)
    out = lowbit.quantize(low, tmp_path / "out", RTN(bits=8))
    logits = [quantized.logits(lowbit.load(model)[0]) for model in (low, dense, out)]
    assert zoo.error(logits[0], logits[1]) < 0.01  # transformers dequantizes it to float32
    assert zoo.error(logits[2], logits[1]) < 0.05
    (found,) = lowbit.evaluate([out], texts=[quantized.text()], seqlen=16, reference=low)
    (wanted,) = lowbit.evaluate([out], texts=[quantized.text()], seqlen=16, reference=dense)
    assert found.divergence == wanted.divergence


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 10, 2, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(120, 134, (3, 10, 2), generator=draw, dtype=torch.uint8)
    tensors = {"experts.down_proj_blocks": codes, "experts.down_proj_scales": scales}
    tensors |= {"experts.down_proj_bias": torch.ones(3, 10), "ids": torch.tensor([1])}
    save_file(tensors, tmp_path / "model.safetensors")
    section = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(section))
    reader = open_checkpoint(tmp_path)
    assert reader.tensors["experts.down_proj"].shape == (3, 64, 10)
    found = reader.read(["experts.down_proj"])["experts.down_proj"]
    wanted = convert_moe_packed_tensors(codes, scales, dtype=torch.bfloat16)
    assert torch.equal(found, wanted) and found.dtype == torch.bfloat16
    assert set(reader.tensors) == {"experts.down_proj", "experts.down_proj_bias", "ids"}
    assert reader.dequantized == {"MXFP4": 1}


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "integers of another program": (
        {"a.weight_packed": torch.zeros(4, 4, dtype=torch.int32)},
        "already quantized",
    ),
    "no scales": (
        {"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)},
        "a.weight is torch.float8_e4m3fn and its scales are not known",
    ),
    "no scales of blocks": (
        {"a_blocks": torch.zeros(4, 2, 16, dtype=torch.uint8)},
        "a_scales is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read(name: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[name]
    save_file(tensors, tmp_path / "model.safetensors")
    section = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(section))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_transformers_reads_the_same_from_fp8(tmp_path: Path) -> None:
    low, _ = store("blocks that fit", tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(low, dtype=torch.bfloat16)
    reader = open_checkpoint(low)
    name = "model.layers.1.mlp.down_proj.weight"
    found = whole.get_parameter(name)
    assert zoo.error(reader.read([name])[name].float(), found.float()) < 1e-6
