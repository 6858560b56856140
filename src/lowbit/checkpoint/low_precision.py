"""Reads weights that are stored in 8 or 4 bits as float tensors, one tensor at a time.

Some models are published in low precision only: there is no float original.

| stored as                       | tensors                            | for example          |
| ------------------------------- | ---------------------------------- | -------------------- |
| FP8, scales of blocks           | X float8, X_scale_inv              | DeepSeek-V3, MiniMax |
| FP8, scales of rows or tensors  | X float8, X_scale or X_scale_inv   | Ministral 3          |
| FP4 in bytes, scales of 32      | X int8, X_scale_inv or .scale      | DeepSeek-V4          |
| MXFP4                           | X_blocks uint8, X_scales uint8     | gpt-oss              |

A scale is multiplied, also where its name ends in "_inv". MXFP4 (OCP Microscaling Formats,
version 1.0): a block of 32 values of FP4 (E2M1), two to a byte, low bits first, has the scale
2 ** (byte - 127). gpt-oss stores its experts as (experts, out, in), and its float model holds them
as (experts, in, out).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.ahead import read_ahead
from lowbit.checkpoint.other_programs import stated_quantization
from lowbit.checkpoint.reader import CheckpointReader, TensorInfo, read_json, read_tensors

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTES = (torch.int8, torch.uint8)
# Names of the scales of a tensor X.weight or X, after what is left of the name without the suffix.
SCALES = (
    *(("", "_scale_inv"), ("", "_scale"), (".weight", ".scale"), (".weight", ".qscale_weight")),
)
UNUSED = ("activation_scale", "input_scale", "qscale_act")  # scales of inputs, which stay float
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
METHODS = ("fp8", "fbgemm_fp8", "mxfp4")  # quant_method in config.json
COMPRESSED_FP8 = ("compressed-tensors", "float-quantized")  # quant_method and format


@dataclass(frozen=True)
class Stored:
    """A tensor in low precision.

    values, scales: the names of the tensors that store it.
    kind: what it is stored as, for the report.
    shape: its shape as a float tensor.
    """

    values: str
    scales: str
    kind: str
    shape: tuple[int, ...]


class LowPrecisionReader(CheckpointReader):
    """A reader that shows tensors in low precision as tensors of the model's float dtype.

    Raises ValueError for a tensor in low precision whose scales cannot be found.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__(folder)
        self.raw = self.tensors
        section = stated_quantization(config)
        text = config.get("text_config") or {}
        name = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
        named = getattr(torch, str(name or "bfloat16"), torch.bfloat16)
        self.dtype = named if named in (torch.float32, torch.float16) else torch.bfloat16
        self.block = section.get("weight_block_size")
        self.stored = _stored(folder, self.raw, self.block)
        parts = {part for each in self.stored.values() for part in (each.values, each.scales)}
        kept = {
            name: info
            for name, info in self.raw.items()
            if name not in parts and not name.endswith(UNUSED)
        }
        shown = {
            name: TensorInfo(self.raw[each.values].file, each.shape, self.dtype)
            for name, each in self.stored.items()
        }
        self.tensors = kept | shown

    @property
    def stored_bytes(self) -> int:
        return sum(info.bytes for info in self.raw.values())

    @property
    def dequantized(self) -> dict[str, int]:
        kinds = [each.kind for each in self.stored.values()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns the named tensors, on the CPU; those in low precision in the float dtype."""
        wanted = list(names)
        plain = [name for name in wanted if name not in self.stored]
        found = read_tensors(self.folder, self.raw, plain)
        for name in wanted:
            if name in self.stored:
                each = self.stored[name]
                parts = read_tensors(self.folder, self.raw, [each.values, each.scales])
                values, scales = parts[each.values], parts[each.scales]
                found[name] = self._float(name, values, scales).to(self.dtype)
        return {name: found[name] for name in wanted}

    def read_ahead(self, names: Iterable[str]) -> None:
        stored = [self.stored.get(name, name) for name in names]
        parts = [(n,) if isinstance(n, str) else (n.values, n.scales) for n in stored]
        files = {name: info.file for name, info in self.raw.items()}
        read_ahead(self.folder, files, (name for each in parts for name in each))

    def _float(self, name: str, values: Tensor, scales: Tensor) -> Tensor:
        if self.stored[name].kind == "MXFP4":
            blocks = _fp4(values) * torch.exp2(scales.float() - 127)[..., None]
            return blocks.flatten(-2).transpose(-1, -2).contiguous()
        if values.dtype in BYTES:
            values = _fp4(values)
        if scales.dtype == torch.uint8:  # exponents, as E8M0 stores them
            scales = torch.exp2(scales.float() - 127)
        return values.float() * _spread(scales.float(), values.shape, self.block)


def open_checkpoint(folder: Path) -> CheckpointReader:
    """Returns a reader of a folder; weights in FP8 or FP4 are read as float.

    Raises ValueError for weights in low precision that cannot be read.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if isinstance(config, dict) and is_low_precision(stated_quantization(config)):
        return LowPrecisionReader(folder, config)
    return CheckpointReader(folder)


def is_low_precision(section: Any) -> bool:
    """Whether a quantization_config stands for weights that `LowPrecisionReader` can read."""
    if not isinstance(section, Mapping):
        return False
    method = section.get("quant_method")
    return method in METHODS or (method, section.get("format")) == COMPRESSED_FP8


def _stored(folder: Path, tensors: dict[str, TensorInfo], block: Any) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, info in tensors.items():
        if name.endswith("_blocks") and info.dtype == torch.uint8:
            base = name.removesuffix("_blocks")
            if f"{base}_scales" not in tensors:
                raise ValueError(f"{folder}: tensor {base}_scales is missing, the scales of {name}")
            *outer, rows, groups, width = info.shape
            shape = (*outer, groups * width * 2, rows)
            found[base] = Stored(name, f"{base}_scales", "MXFP4", shape)
        elif info.dtype in FP8 or info.dtype in BYTES:
            scales = _scales_of(name, tensors)
            if scales is None:
                if info.dtype in FP8 or name.endswith(("_packed", "_shape")):
                    raise ValueError(
                        f"{folder}: tensor {name} is {info.dtype} and its scales are not known "
                        "(allowed are FP8 with scales, and MXFP4): quantize the float model instead"
                    )
                continue
            if name.endswith("_scales") or scales == name:
                continue
            packed = info.dtype in BYTES
            shape = (*info.shape[:-1], info.shape[-1] * 2) if packed else info.shape
            kind = "FP4" if packed else f"FP8 with {_grid(tensors[scales].shape, shape, block)}"
            found[name] = Stored(name, scales, kind, shape)
    if not found:
        raise ValueError(
            f"{folder} is already quantized, and lowbit cannot dequantize it (allowed are FP8 with "
            "scales, and MXFP4): quantize the float model instead"
        )
    return found


def _scales_of(name: str, tensors: dict[str, TensorInfo]) -> str | None:
    for suffix, ending in SCALES:
        if name.endswith(suffix) and (scales := name.removesuffix(suffix) + ending) in tensors:
            return scales
    return None


def _grid(scales: tuple[int, ...], shape: tuple[int, ...], block: Any) -> str:
    if len(scales) < 2 and (not scales or scales[0] == 1):
        return "one scale per tensor"
    if len(scales) < 2 or scales[-1] == 1:
        return "one scale per row"
    rows, columns = block or (-(-shape[-2] // scales[-2]), -(-shape[-1] // scales[-1]))
    return f"scales of blocks of {rows} x {columns}"


def _spread(scales: Tensor, shape: torch.Size, block: Any) -> Tensor:
    """Returns the scale of each value, of a shape that broadcasts with `shape`.

    scales: one for the tensor, one for each row, or one for each block of the last two dimensions;
        blocks at the end may be smaller than the others.
    """
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.dim() == 1:
        scales = scales[:, None]
    for at, dim in enumerate((len(shape) - 2, len(shape) - 1)):
        dim -= len(shape) - scales.dim()
        if scales.shape[dim] == 1:
            continue
        size, count = shape[dim - scales.dim()], scales.shape[dim]
        width = block[at] if block and -(-size // block[at]) == count else -(-size // count)
        scales = scales.repeat_interleave(width, dim).narrow(dim, 0, size)
    return scales


def _fp4(values: Tensor) -> Tensor:
    """Returns the values of bytes with two FP4 codes each: (..., n) -> (..., 2 n) float32."""
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    codes = values.contiguous().view(torch.uint8)
    return torch.stack([table[(codes & 15).int()], table[(codes >> 4).int()]], dim=-1).flatten(-2)
