"""The nested format: 8-bit codes whose upper bits are also usable as codes of 2 to 7 bits.

    weight = scale * (slice(code, bits) - zero),   slice(code, bits) = step * sliced,
    step = 2**(8 - bits),   sliced = floor(code / step + 1/2), at most 2**bits - 1

The method is MatQuant (arXiv 2502.06786). With `extra_precision`, `sliced` is at most 2**bits, so
that there is one code more. A row of the weight is cut into groups as in the uniform format:
groups = ceil(in / group_size), or 1 if `group_size` is null. A slice has the `scale` and `zero` of
the 8-bit codes, except at the widths in `own_grids`: these have their own in `slice_scale` and
`slice_zero`, in the order of the list. The tensors are stored row-major:

| name          | dtype              | shape                      | holds                          |
| ------------- | ------------------ | -------------------------- | ------------------------------ |
| `master`      | uint8              | (out, in)                  | the codes; resident "master"   |
| `packed`      | uint8              | (out, ceil(in * bits / 8)) | `sliced`; resident "slice"     |
| `overflow`    | uint8              | (ceil(top_codes / 8),)     | absent if `top_codes` is null  |
| `scale`       | float16 or float32 | (out, groups)              | as `scale_dtype` says          |
| `zero`        | uint8              | (groups, out)              | absent if symmetric: all 128   |
| `slice_scale` | like `scale`       | (own_grids, out, groups)   | absent if `own_grids` is []    |
| `slice_zero`  | uint8              | (own_grids, groups, out)   | absent like both others        |
| `bias`        | as `bias` says     | (out,)                     | absent if `bias` is null       |

A layer stores either the 8-bit codes (the master), which can run at every width, or one slice with
`bits` bits per code. `packed` holds min(sliced, 2**bits - 1), in a little-endian bit stream for
each row as in the uniform format. A slice with extra precision below 8 bits also has `overflow`. It
has one bit for each code of 2**bits - 1, in row-major order, low bits first; the bit is 1 where
`sliced` is 2**bits. There are `top_codes` such codes.

The scales of a layer are float16. They are all float32 if one of them would lose range in float16.
In the entry in config.json, `bits` is the width at which the layer runs, `trained` lists the
widths for which it was trained, and `own_grids` those with scales and zero points of their own:

    {"format": "nested", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "bits": 2..8, "group_size": int | null, "symmetric": bool, "extra_precision": bool,
     "trained": [2..8, ...], "resident": "master" | "slice", "top_codes": int | null,
     "scale_dtype": "float16" | "float32", "own_grids": [2..7, ...]}

`own_grids` may be left out if it is []. An entry may also have the key `dtype`, which
`formats/entry.py` describes.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.checks import check_shape, dtype_name, finite, storable
from lowbit.formats.nested import reference
from lowbit.formats.nested.cpu import Cpu
from lowbit.formats.nested.entry import SYMMETRIC_ZERO, WIDTHS, NestedEntry, tensor_bytes
from lowbit.formats.nested.triton import Triton
from lowbit.formats.uniform import UniformLinear
from lowbit.formats.uniform.reference import group_count, quantize
from lowbit.kernels.bits import pack, packed_bytes
from lowbit.kernels.slicing import MASTER_BITS, slice_codes, step

__all__ = [
    "WIDTHS",
    "NestedEntry",
    "NestedLayout",
    "NestedLinear",
    "SliceGrid",
    "slice_tensors",
    "sliced_entry",
    "tensor_bytes",
    "to_uniform",
]


@dataclass(frozen=True)
class NestedLayout:
    """The grid of a master.

    group_size: number of inputs that share a scale and a zero point; None: a whole row.
    extra_precision: whether slices have one code more.
    trained: the widths for which the codes were trained.
    """

    group_size: int | None
    extra_precision: bool = False
    trained: tuple[int, ...] = ()


@dataclass(frozen=True)
class SliceGrid:
    """The scales and zero points of the slice at one width.

    scale: (out, groups).
    zero: (out, groups) uint8, in units of the 8-bit codes; None: the layer is symmetric.
    """

    scale: Tensor
    zero: Tensor | None


class NestedLinear(QuantizedLinear):
    """A linear layer in the nested format; the module's docstring gives its byte layout."""

    format = "nested"
    Entry = NestedEntry
    backends = (Cpu(), Triton(), reference.Reference())
    vectors = ("scale", "slice_scale")

    spec: NestedEntry
    master: Tensor
    packed: Tensor
    overflow: Tensor | None
    scale: Tensor
    zero: Tensor | None
    slice_scale: Tensor | None
    slice_zero: Tensor | None

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
        own = len(spec.own_grids)
        self.add_frozen("slice_scale", (own, rows, groups), spec.scale_dtype if own else None)
        zeros = "uint8" if own and not spec.symmetric else None
        self.add_frozen("slice_zero", (own, groups, rows), zeros)

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
        """Rounds a float weight to the nearest codes, given the scale as it will be stored.

        weight: (out, in).
        scale: (out, groups).
        zero: (out, groups), rounded and clamped to 0 to 255; None: the layer is symmetric.
        bias, dtype: as for `from_codes`.

        Returns a master.
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
        own: Mapping[int, SliceGrid] | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Returns a master with these codes, which runs at 8 bits.

        codes: (out, in) uint8.
        scale: (out, groups).
        zero: (out, groups) uint8; None: symmetric, all zero points are 128.
        own: the grids of slices that have their own, by width; scales are stored in the dtype that
            `scale` is stored in.
        bias: (out,), kept in its dtype.
        dtype: dtype of the original float weight; None: unknown.
        """
        scale = storable(scale)
        if zero is not None:
            check_shape("zero", zero, scale.shape)
            zero = zero.T
        tensors = {"master": codes, "scale": scale, "zero": zero, "bias": bias}
        return cls.from_tensors(
            codes.shape,
            tensors | _stacked(own or {}, scale.dtype),
            dtype,
            bits=MASTER_BITS,
            group_size=layout.group_size,
            symmetric=zero is None,
            extra_precision=layout.extra_precision,
            trained=list(layout.trained),
            resident="master",
            top_codes=None,
            scale_dtype=dtype_name(scale.dtype),
            **({"own_grids": list(own)} if own else {}),
        )

    @property
    def bits(self) -> int:
        """The bit width at which the layer runs."""
        return self.spec.bits

    @property
    def widths(self) -> tuple[int, ...]:
        return self.spec.widths

    def set_bits(self, bits: int) -> None:
        """Sets the width of the next forwards. Raises ValueError for a slice of another width."""
        step(bits)
        if bits not in self.widths:
            raise ValueError(
                f"this layer holds a slice of {self.bits} bits: allowed is {self.bits}; to run at "
                f"{bits} bits, load the master again"
            )
        self.spec = self.spec.model_copy(update={"bits": bits})

    def at(self, bits: int) -> "NestedLinear":
        """Returns this layer at another width; the two layers share their tensors."""
        other = copy(self)
        other._parameters = dict(self._parameters)
        other.set_bits(bits)
        return other

    def slice(self, bits: int) -> "NestedLinear":
        """Returns a layer that stores one slice of this master only, with `bits` bits per code."""
        entry = sliced_entry(self.entry(), bits, getattr(self, "master", None))
        with torch.device("meta"):
            made = NestedLinear.from_entry(entry)
        state = self.state_dict()
        state |= slice_tensors(made.spec, state.pop("master"))
        state |= grid_tensors(self.at(bits))
        for name in ("slice_scale", "slice_zero"):
            state.pop(name, None)
        made.load_state_dict(state, assign=True)
        return made

    def codes(self) -> Tensor:
        """Returns `sliced` at the present width: (out, in) uint8, in units of `step(bits)`."""
        spec = self.spec
        if spec.resident == "master":
            return slice_codes(self.master, spec.bits, spec.extra_precision)
        above = self.overflow
        tops = None if above is None else reference.top_codes(above, spec.bits, spec.top_codes or 0)
        return reference.unpack_slice(self.packed, tops, spec.bits, self.in_features)

    def scales(self) -> Tensor:
        """Returns the scales at the present width, of 8-bit codes: (out, groups)."""
        return grid_tensors(self)["scale"]

    def zeros(self) -> Tensor:
        """Returns the zero points in units of the 8-bit codes: (out, groups) uint8."""
        zero = grid_tensors(self).get("zero")
        if zero is None:
            return torch.full_like(self.scale, SYMMETRIC_ZERO, dtype=torch.uint8)
        return zero.T.contiguous()

    def dequantize(self) -> Tensor:
        spec = self.spec
        codes = self.codes().to(torch.int16).mul_(step(spec.bits))
        weight = torch.empty_like(codes, dtype=torch.float32)
        scale, zero = self.scales().float(), self.zeros().float()
        reference.write_weight(weight, codes, scale, zero, spec.group_size)
        return weight


def sliced_entry(entry: dict[str, Any], bits: int, master: Tensor | None = None) -> dict[str, Any]:
    """Returns the entry of a slice that is stored. Its one grid is that of its width.

    entry: the entry of the master.
    bits: width of the slice.
    master: (out, in) uint8, the master's codes; only needed with extra precision.

    Raises ValueError if the entry is that of a slice.
    """
    spec = NestedEntry.model_validate(entry)
    if spec.resident != "master":
        raise ValueError(
            f"it is a slice of {spec.bits} bits: a slice of {bits} bits can only be cut from the "
            "master"
        )
    top_codes = None
    if spec.extra_precision and step(bits) > 1:
        if master is None:
            raise ValueError("the entry of a slice with extra precision needs the master's codes")
        top_codes = reference.count_top_codes(master, bits)
    stored = {key: value for key, value in entry.items() if key != "own_grids"}
    return {**stored, "bits": bits, "resident": "slice", "top_codes": top_codes}


def grid_tensors(layer: NestedLinear) -> dict[str, Tensor]:
    """Returns `scale` and, unless symmetric, `zero` of the layer's present width, as stored."""
    own = layer.spec.own_grids
    scale, zero = layer.scale, layer.zero
    if layer.bits in own:
        at = own.index(layer.bits)
        assert layer.slice_scale is not None
        scale = layer.slice_scale[at]
        zero = None if layer.slice_zero is None else layer.slice_zero[at]
    return {"scale": scale} if zero is None else {"scale": scale, "zero": zero}


def _stacked(own: Mapping[int, SliceGrid], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Returns the stored tensors of the slices' own grids."""
    if not own:
        return {}
    zeros = [grid.zero.T for grid in own.values() if grid.zero is not None]
    return {
        "slice_scale": torch.stack([grid.scale.to(dtype) for grid in own.values()]),
        "slice_zero": torch.stack(zeros) if zeros else None,
    }


def slice_tensors(spec: NestedEntry, master: Tensor) -> dict[str, Tensor]:
    """Returns the tensors that the slice `spec` has instead of `master`, cut from `master`."""
    packed, overflow = reference.pack_slice(master, spec.bits, spec.extra_precision)
    return (
        {"packed": packed} if spec.top_codes is None else {"packed": packed, "overflow": overflow}
    )


def to_uniform(layer: NestedLinear, bits: int) -> UniformLinear:
    """Converts a slice to the uniform format; the weight stays the same to the last bit.

    The zero points are in units of the 8-bit codes: multiples of 2**-(8 - bits) codes of the slice.

    Raises ValueError for a slice that uses its extra code, because `bits` bits cannot hold it.
    """
    layer = layer.at(bits)
    codes, spec = layer.codes(), layer.spec
    above = int((codes == 2**bits).sum()) if bits < MASTER_BITS else 0
    if above:
        raise ValueError(
            f"{above} weights have the code {2**bits} that extra precision adds: the uniform "
            f"format holds codes of 0 to {2**bits - 1} at {bits} bits"
        )
    # float32 scales stay float32, even within the range of float16, because float16 rounds them.
    grid = grid_tensors(layer)
    scale = grid["scale"].float() * step(bits)
    half = (
        spec.scale_dtype == "float16" and float(scale.abs().max()) <= torch.finfo(torch.float16).max
    )
    return UniformLinear.from_tensors(
        (layer.out_features, layer.in_features),
        {"packed": pack(codes, bits), "scale": scale, "zero": grid.get("zero"), "bias": layer.bias},
        bits=bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        dtype=spec.weight_dtype,
        zero_shift=0 if spec.symmetric else MASTER_BITS - bits,
        scale_dtype="float16" if half else "float32",
    )
