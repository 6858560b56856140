"""Codes on a uniform grid of 2 to 8 bits, with a scale and a zero point for each group of inputs.

    weight = scale * (code - zero / 2**zero_shift)

A row of the weight is cut into groups of `group_size` inputs; the last one may be shorter, none
reaches into the next row, and `group_size: null` makes the whole row one group:
groups = ceil(in / group_size), or 1. The tensors, row-major:

| name     | dtype              | shape                           | holds                       |
| -------- | ------------------ | ------------------------------- | --------------------------- |
| `packed` | uint8              | (out, ceil(in * bits / 8))      | a row's codes, along inputs |
| `scale`  | float16 or float32 | (out, groups)                   | as `scale_dtype` says       |
| `zero`   | uint8              | (groups, ceil(out * zbits / 8)) | a group's zeros, along rows |
| `bias`   | as `bias` says     | (out,)                          | absent where `bias` is null |

zbits = bits + zero_shift, at most 8. Codes (`bits` wide) and zeros (`zbits` wide) are unsigned, in
little-endian bit streams: number j of a row of `packed` or `zero` occupies the bits
[j * width, (j + 1) * width) of that row, low bits first, where bit i is bit i % 8 of byte i // 8;
each row starts on a byte and its last byte is filled up with zero bits. A symmetric layer has no
`zero`: its zero points are all 2**(bits - 1), and zero_shift is 0. Float numbers are little-endian.

Scales are float16 unless one of them would lose range there (a non-zero magnitude below 2**-14 or
above 65504); the layer's are then all float32. The entry in config.json:

    {"format": "uniform", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "bits": 2..8, "group_size": int | null, "symmetric": bool, "zero_shift": 0..6,
     "scale_dtype": "float16" | "float32"}

and, in a layer that rounds what it reads when it runs, `"activation": {"bits": 3..8, "symmetric":
bool}`: each token on 2**bits values that span its range and 0, as `kernels/tokens.py` says.
"""

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lowbit.formats.activation import Activation
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.checks import check_shape, dtype_name, finite, storable
from lowbit.formats.entry import LayerEntry, ScaleName, Size
from lowbit.formats.uniform import reference
from lowbit.kernels.bits import pack, packed_bytes, unpack


class UniformEntry(LayerEntry):
    """The entry of a layer; the module\'s docstring explains it."""

    format: Literal["uniform"]
    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Size | None
    symmetric: bool
    zero_shift: Annotated[int, Field(ge=0, le=6)]
    scale_dtype: ScaleName
    activation: Activation | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        most = 0 if self.symmetric else 8 - self.bits
        if self.zero_shift > most:
            raise ValueError(
                f"zero_shift is {self.zero_shift}: allowed with bits {self.bits} and "
                f"symmetric {self.symmetric} are 0 to {most}"
            )
        self.check_bytes(tensor_bytes(**self.model_dump(exclude={"format", "bias", "activation"})))
        return self


def tensor_bytes(
    shape: list[int] | tuple[int, int],
    bits: int,
    group_size: int | None,
    symmetric: bool,
    zero_shift: int,
    scale_dtype: str,
) -> int:
    """Bytes that stand for the weight, those of `UniformLinear.weight_bytes()`:

    out * ceil(in * bits / 8) + out * groups * (2 or 4) + groups * ceil(out * zbits / 8)

    that is codes, scales (2 for float16) and, unless symmetric, zeros (zbits = bits + zero_shift).
    """
    rows, columns = shape
    groups = reference.group_count(columns, group_size)
    scales = rows * groups * getattr(torch, scale_dtype).itemsize
    zeros = 0 if symmetric else groups * packed_bytes(rows, bits + zero_shift)
    return rows * packed_bytes(columns, bits) + scales + zeros


class UniformLinear(QuantizedLinear):
    """A linear layer on a uniform grid; the module's docstring gives its bytes."""

    format = "uniform"

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, spec: UniformEntry) -> None:
        rows, columns = spec.shape
        super().__init__(columns, rows, spec.bias and getattr(torch, spec.bias))
        self.spec = spec
        self.activation = spec.activation
        groups = reference.group_count(columns, spec.group_size)
        self.add_frozen("packed", (rows, packed_bytes(columns, spec.bits)), torch.uint8)
        self.add_frozen("scale", (rows, groups), getattr(torch, spec.scale_dtype))
        if spec.symmetric:
            self.zero = None
        else:
            width = packed_bytes(rows, spec.bits + spec.zero_shift)
            self.add_frozen("zero", (groups, width), torch.uint8)

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Self:
        return cls(UniformEntry.model_validate(entry))

    def entry(self) -> dict[str, Any]:
        return self.spec.model_dump(exclude={"activation"}) | self.common_entry()

    @classmethod
    def from_grid(
        cls,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        group_size: int | None,
        symmetric: bool,
        bias: Tensor | None = None,
    ) -> Self:
        """The nearest codes to a float weight, counted from the scale as it is stored.

        weight: (out, in)  scale: (out, groups)  bias: (out,)
        zero: (out, groups), rounded and clamped to a code; None when symmetric
        """
        grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "zero_shift": 0}
        layer = cls._on_grid(weight, scale, bias, grid)
        if zero is not None:
            zero = finite("zero", zero).round().clamp(0, 2**bits - 1).to(torch.uint8)
        layer._store_zeros(zero)
        points = reference.zero_points(layer.zero, layer.scale, bits, 0)
        codes = reference.quantize(finite("weight", weight), layer.scale, points, bits, group_size)
        layer.packed.copy_(pack(codes, bits))
        return layer

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        group_size: int | None,
        symmetric: bool,
        zero_shift: int = 0,
        bias: Tensor | None = None,
    ) -> Self:
        """codes: (out, in) uint8  scale: (out, groups)  bias: (out,)
        zero: (out, groups) of an integer dtype, in units of 2**-zero_shift; None when symmetric
        """
        grid = {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "zero_shift": zero_shift,
        }
        layer = cls._on_grid(codes, scale, bias, grid)
        layer._store_zeros(zero)
        layer.packed.copy_(pack(codes, bits))
        return layer

    @classmethod
    def _on_grid(
        cls, matrix: Tensor, scale: Tensor, bias: Tensor | None, grid: dict[str, Any]
    ) -> Self:
        """A layer for `matrix`, on its device, that has its scale and bias, but no code yet."""
        scale = storable(scale)
        common = {
            "format": cls.format,
            "shape": list(matrix.shape),
            "bias": None if bias is None else dtype_name(bias.dtype),
            "scale_dtype": dtype_name(scale.dtype),
        }
        with matrix.device:
            layer = cls.from_entry(common | grid)
        check_shape("scale", scale, layer.scale.shape)
        layer.scale.copy_(scale)
        if layer.bias is not None and bias is not None:
            check_shape("bias", bias, layer.bias.shape)
            layer.bias.copy_(bias.detach())
        return layer

    def _store_zeros(self, zero: Tensor | None) -> None:
        if (zero is None) != self.spec.symmetric:
            given = "missing" if zero is None else "given"
            raise ValueError(
                f"zero is {given} and symmetric is {self.spec.symmetric}: a layer that is not "
                "symmetric takes zero points, a symmetric one takes None"
            )
        if zero is None or self.zero is None:
            return
        width = self.spec.bits + self.spec.zero_shift
        check_shape("zero", zero, self.scale.shape)
        if zero.is_floating_point():
            raise ValueError(f"zero is {zero.dtype}: allowed are integers")
        if int(zero.min()) < 0 or int(zero.max()) >= 2**width:
            raise ValueError(
                f"zero goes from {int(zero.min())} to {int(zero.max())}: allowed at "
                f"{width} bits are 0 to {2**width - 1}"
            )
        self.zero.copy_(pack(zero.T.to(torch.uint8), width))

    def codes(self) -> Tensor:
        """(out, in) uint8"""
        return unpack(self.packed, self.spec.bits, self.in_features)

    def zeros(self) -> Tensor:
        """(out, groups) uint8, in units of 2**-zero_shift"""
        spec = self.spec
        return reference.zero_points(self.zero, self.scale, spec.bits, spec.zero_shift).contiguous()

    def dequantize(self) -> Tensor:
        spec = self.spec
        return reference.dequantize(
            self.packed,
            self.scale,
            self.zero,
            spec.bits,
            spec.group_size,
            spec.zero_shift,
            self.in_features,
        )
