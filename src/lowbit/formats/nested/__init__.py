"""8-bit codes whose upper bits are good models of 2 to 7 bits (MatQuant, arXiv 2502.06786).

    weight = scale * (slice(code, bits) - zero),   slice(code, bits) = step * sliced,
    step = 2**(8 - bits),   sliced = floor(code / step + 1/2), at most 2**bits - 1

`scale` and `zero` are the same at every width: a slice keeps those of the 8-bit codes. With
`extra_precision`, `sliced` is at most 2**bits, one code more. A row of the weight is cut into
groups as in the uniform format: groups = ceil(in / group_size), or 1 when `group_size` is null. The
tensors, row-major:

| name       | dtype              | shape                      | holds                             |
| ---------- | ------------------ | -------------------------- | --------------------------------- |
| `master`   | uint8              | (out, in)                  | the codes; resident "master"      |
| `packed`   | uint8              | (out, ceil(in * bits / 8)) | `sliced`; resident "slice"        |
| `overflow` | uint8              | (ceil(top_codes / 8),)     | see below; absent: top_codes null |
| `scale`    | float16 or float32 | (out, groups)              | as `scale_dtype` says             |
| `zero`     | uint8              | (groups, out)              | absent where symmetric: all 128   |
| `bias`     | as `bias` says     | (out,)                     | absent where `bias` is null       |

A folder holds the 8-bit codes (the master), which run at any width, or one slice in its own bits.
`packed` holds min(sliced, 2**bits - 1), in a little-endian bit stream for each row as in the
uniform format. A slice with extra precision below 8 bits has `overflow` too: for each code of
2**bits - 1, in row-major order, one bit that is 1 where `sliced` is 2**bits; low bits come first.
There are `top_codes` such codes.

The scales of a layer are float16, or all of them float32 where one would lose range in float16. In
the entry in config.json, `bits` is the width at which the layer runs, and `trained` lists the
widths that it was made for:

    {"format": "nested", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "bits": 2..8, "group_size": int | null, "symmetric": bool, "extra_precision": bool,
     "trained": [2..8, ...], "resident": "master" | "slice", "top_codes": int | null,
     "scale_dtype": "float16" | "float32"}

An entry may also have the `dtype` of `formats/entry.py`.
"""

from copy import copy
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.checks import check_shape, dtype_name, finite, storable
from lowbit.formats.entry import LayerEntry, ScaleName, Size
from lowbit.formats.nested import reference
from lowbit.formats.uniform import UniformLinear
from lowbit.formats.uniform.reference import group_count, quantize
from lowbit.kernels.bits import pack, packed_bytes
from lowbit.kernels.slicing import MASTER_BITS, slice_codes, step

WIDTHS = tuple(range(2, MASTER_BITS + 1))  # of a master
Width = Annotated[int, Field(ge=WIDTHS[0], le=WIDTHS[-1])]
SYMMETRIC_ZERO = 128  # a multiple of every step: a zero of the master is one of each slice


class NestedEntry(LayerEntry):
    """The entry of a layer; the module's docstring explains it."""

    format: Literal["nested"]
    bits: Width
    group_size: Size | None
    symmetric: bool
    extra_precision: bool
    trained: list[Width]
    resident: Literal["master", "slice"]
    top_codes: Annotated[int, Field(ge=0)] | None
    scale_dtype: ScaleName

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        overflows = self.resident == "slice" and self.extra_precision and self.bits < MASTER_BITS
        if (self.top_codes is not None) != overflows:
            raise ValueError(
                f"top_codes is {self.top_codes}: a number belongs to slices below 8 bits with "
                "extra precision, null to all else"
            )
        rows, columns = self.shape
        if (self.top_codes or 0) > rows * columns:
            raise ValueError(f"top_codes is {self.top_codes}: there are {rows * columns} codes")
        self.check_bytes(tensor_bytes(**self.model_dump(exclude={"format", "bias"})))
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """All of a master; the one of a slice."""
        return WIDTHS if self.resident == "master" else (self.bits,)


@dataclass(frozen=True)
class NestedLayout:
    """How a master is made.

    group_size: inputs that share a scale and a zero point; None: a whole row.
    extra_precision: whether slices have one code more.
    trained: the widths that it is made for.
    """

    group_size: int | None
    extra_precision: bool = False
    trained: tuple[int, ...] = ()


def tensor_bytes(
    shape: list[int] | tuple[int, int],
    bits: int,
    group_size: int | None,
    symmetric: bool,
    resident: str,
    top_codes: int | None,
    scale_dtype: str,
    **free: Any,
) -> int:
    """Bytes that stand for the weight, those of `NestedLinear.weight_bytes()`:

    out * ceil(in * b / 8) + ceil(top_codes / 8) + out * groups * (2 or 4) + groups * out

    that is codes (b = 8 for a master, else bits), the overflow where there is one, scales (2 for
    float16) and, unless symmetric, zeros. free: what else an entry holds takes no bytes.
    """
    rows, columns = shape
    groups = group_count(columns, group_size)
    codes = rows * packed_bytes(columns, MASTER_BITS if resident == "master" else bits)
    scales = rows * groups * getattr(torch, scale_dtype).itemsize
    zeros = 0 if symmetric else groups * rows
    return codes + packed_bytes(top_codes or 0, 1) + scales + zeros


class NestedLinear(QuantizedLinear):
    """A linear layer that runs at one of several widths; the module's docstring gives its bytes."""

    format = "nested"
    Entry = NestedEntry
    backends = (reference.Reference(),)

    spec: NestedEntry
    master: Tensor
    packed: Tensor
    overflow: Tensor | None
    scale: Tensor
    zero: Tensor | None

    def __init__(self, spec: NestedEntry) -> None:
        super().__init__(spec)
        rows, columns = spec.shape
        groups, master = group_count(columns, spec.group_size), spec.resident == "master"
        self.add_frozen("master", (rows, columns), "uint8" if master else None)
        width = packed_bytes(columns, spec.bits)
        self.add_frozen("packed", (rows, width), None if master else "uint8")
        above = packed_bytes(spec.top_codes or 0, 1)
        self.add_frozen("overflow", (above,), None if spec.top_codes is None else "uint8")
        self.add_frozen("scale", (rows, groups), spec.scale_dtype)
        self.add_frozen("zero", (groups, rows), None if spec.symmetric else "uint8")

    @classmethod
    def from_grid(
        cls,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        layout: NestedLayout,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The nearest codes of a master to a float weight, counted from the scale as it is stored.

        weight: (out, in)  scale: (out, groups)
        zero: (out, groups), rounded and clamped to 0 to 255; None when symmetric
        bias, dtype: as `from_codes` takes them.
        """
        scale = storable(scale)
        if zero is None:
            points = torch.full_like(scale, SYMMETRIC_ZERO, dtype=torch.uint8)
        else:
            points = finite("zero", zero).round().clamp(0, 255).to(torch.uint8)
        weight = finite("weight", weight)
        codes = quantize(weight, scale, points, MASTER_BITS, layout.group_size)
        points_or_none = None if zero is None else points
        return cls.from_codes(codes, scale, points_or_none, layout, bias=bias, dtype=dtype)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        layout: NestedLayout,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A master that runs at 8 bits.

        codes: (out, in) uint8  scale: (out, groups)
        zero: (out, groups) uint8; None makes it symmetric, with all zeros at 128
        bias: (out,), kept in its dtype.
        dtype: of the float weight that the layer stands for; None: not known.
        """
        scale = storable(scale)
        if zero is not None:
            check_shape("zero", zero, scale.shape)
            zero = zero.T
        return cls.from_tensors(
            codes.shape,
            {"master": codes, "scale": scale, "zero": zero, "bias": bias},
            dtype,
            bits=MASTER_BITS,
            group_size=layout.group_size,
            symmetric=zero is None,
            extra_precision=layout.extra_precision,
            trained=list(layout.trained),
            resident="master",
            top_codes=None,
            scale_dtype=dtype_name(scale.dtype),
        )

    @property
    def bits(self) -> int:
        """The width at which it runs."""
        return self.spec.bits

    @property
    def widths(self) -> tuple[int, ...]:
        return self.spec.widths

    def set_bits(self, bits: int) -> None:
        """Runs at another width from now on. ValueError for a slice, which has one width only."""
        step(bits)
        if bits not in self.widths:
            raise ValueError(
                f"this layer holds a slice of {self.bits} bits: allowed is {self.bits}; to run at "
                f"{bits} bits, load the master again"
            )
        self.spec = self.spec.model_copy(update={"bits": bits})

    def at(self, bits: int) -> "NestedLinear":
        """The same layer, its tensors too, at a width of its own."""
        other = copy(self)
        other._parameters = dict(self._parameters)
        other.set_bits(bits)
        return other

    def slice(self, bits: int) -> "NestedLinear":
        """A layer that holds this slice of a master alone, in its own bits."""
        entry = sliced_entry(self.entry(), bits, getattr(self, "master", None))
        with torch.device("meta"):
            made = NestedLinear.from_entry(entry)
        state = self.state_dict()
        state |= slice_tensors(made.spec, state.pop("master"))
        made.load_state_dict(state, assign=True)
        return made

    def codes(self) -> Tensor:
        """(out, in) uint8, in units of `step(bits)`, up to 2**bits with extra precision"""
        spec = self.spec
        if spec.resident == "master":
            return slice_codes(self.master, spec.bits, spec.extra_precision)
        above = self.overflow
        tops = None if above is None else reference.top_codes(above, spec.bits, spec.top_codes or 0)
        return reference.unpack_slice(self.packed, tops, spec.bits, self.in_features)

    def zeros(self) -> Tensor:
        """(out, groups) uint8, in units of the master's codes"""
        if self.zero is None:
            return torch.full_like(self.scale, SYMMETRIC_ZERO, dtype=torch.uint8)
        return self.zero.T.contiguous()

    def dequantize(self) -> Tensor:
        spec = self.spec
        codes = self.codes().to(torch.int16).mul_(step(spec.bits))
        weight = torch.empty_like(codes, dtype=torch.float32)
        scale, zero = self.scale.float(), self.zeros().float()
        reference.write_weight(weight, codes, scale, zero, spec.group_size)
        return weight


def sliced_entry(entry: dict[str, Any], bits: int, master: Tensor | None = None) -> dict[str, Any]:
    """The entry of a master, as that of its slice. ValueError for what is no master.

    master: its codes, (out, in) uint8; needed where the slice has extra precision.
    """
    spec = NestedEntry.model_validate(entry)
    if spec.resident != "master":
        raise ValueError(
            f"it is a slice of {spec.bits} bits: another, of {bits} bits, can only be cut from the "
            "master"
        )
    top_codes = None
    if spec.extra_precision and step(bits) > 1:
        if master is None:
            raise ValueError("a slice with extra precision cannot be described without the codes")
        top_codes = reference.count_top_codes(master, bits)
    return {**entry, "bits": bits, "resident": "slice", "top_codes": top_codes}


def slice_tensors(spec: NestedEntry, master: Tensor) -> dict[str, Tensor]:
    """What takes the place of `master` in the slice that `spec` describes."""
    packed, overflow = reference.pack_slice(master, spec.bits, spec.extra_precision)
    return (
        {"packed": packed} if spec.top_codes is None else {"packed": packed, "overflow": overflow}
    )


def to_uniform(layer: NestedLinear, bits: int) -> UniformLinear:
    """The slice in the uniform format, whose weight is the same to the last bit.

    Its zero points are those of the master, in units of its own code's 2**-(8 - bits). Raises
    ValueError for a slice that uses its extra code, which a code of `bits` bits cannot hold.
    """
    layer = layer.at(bits)
    codes, spec = layer.codes(), layer.spec
    above = int((codes == 2**bits).sum()) if bits < MASTER_BITS else 0
    if above:
        raise ValueError(
            f"{above} weights have the code {2**bits} that extra precision adds: the uniform "
            f"format holds 0 to {2**bits - 1} at {bits} bits"
        )
    # float32 scales stay so: float16 would round them, where it could hold their range.
    scale = layer.scale.float() * step(bits)
    half = (
        spec.scale_dtype == "float16" and float(scale.abs().max()) <= torch.finfo(torch.float16).max
    )
    return UniformLinear.from_tensors(
        (layer.out_features, layer.in_features),
        {"packed": pack(codes, bits), "scale": scale, "zero": layer.zero, "bias": layer.bias},
        bits=bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        dtype=spec.weight_dtype,
        zero_shift=0 if spec.symmetric else MASTER_BITS - bits,
        scale_dtype="float16" if half else "float32",
    )
