"""The uniform format: codes of 2 to 8 bits, with a scale and a zero point per group of inputs.

    weight = scale * (code - zero / 2**zero_shift)

A row of the weight is cut into groups of `group_size` inputs. The last group of a row may be
shorter; no group continues in the next row. With `group_size: null` the whole row is one group. So
groups = ceil(in / group_size), or 1. The tensors are stored row-major:

| name     | dtype              | shape                           | holds                       |
| -------- | ------------------ | ------------------------------- | --------------------------- |
| `packed` | uint8              | (out, ceil(in * bits / 8))      | a row's codes, along inputs |
| `scale`  | float16 or float32 | (out, groups)                   | as `scale_dtype` says       |
| `zero`   | uint8              | (groups, ceil(out * zbits / 8)) | a group's zeros, along rows |
| `bias`   | as `bias` says     | (out,)                          | absent where `bias` is null |

zbits = bits + zero_shift, at most 8. Codes are `bits` wide and zeros `zbits` wide. Both are
unsigned and stored as little-endian bit streams: number j of a row of `packed` or `zero` occupies
the bits [j * width, (j + 1) * width) of that row, low bits first, where bit i is bit i % 8 of byte
i // 8. Each row starts at a byte, and its last byte is filled up with zero bits. A symmetric layer
has no `zero`: its zero points are all 2**(bits - 1), and zero_shift is 0. Float numbers are
little-endian.

The scales of a layer are float16. They are all float32 if one of them would lose range in float16
(a non-zero magnitude below 2**-14 or above 65504). The entry in config.json:

    {"format": "uniform", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "bits": 2..8, "group_size": int | null, "symmetric": bool, "zero_shift": 0..6,
     "scale_dtype": "float16" | "float32"}

A layer that rounds its inputs in a forward also has `"activation": {"bits": 3..8, "symmetric":
bool}`: each token is rounded to 2**bits values that span its range and 0 (`kernels/tokens.py`).

A layer that rotates its inputs also has `"rotation": {"kind": "hadamard" | "hartley", "seed": n}`,
and holds the codes of the rotated weight: the formula above is then that of W R.T. It computes
(W R.T)(R x), where R x = B.T S x with the transform B of that kind and the signs S of that seed, as
`formats/incoherence.py` describes them. R x is what is rounded. `"shares": NAME` names a layer with
equal `rotation` and `activation` that reads the same input, so that both read R x, computed once.
An entry may also have the key `dtype`, which `formats/entry.py` describes.
"""

from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lowbit.formats.activation import Activation
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.checks import check_shape, dtype_name, finite, storable
from lowbit.formats.entry import LayerEntry, ScaleName, Size
from lowbit.formats.reading import InputRotation, Reading
from lowbit.formats.tiles import product_dtype
from lowbit.formats.uniform import reference
from lowbit.formats.uniform.cpu import Cpu
from lowbit.formats.uniform.reference import UniformLayout
from lowbit.formats.uniform.triton import Triton
from lowbit.kernels.bits import pack, packed_bytes, unpack

__all__ = ["UniformEntry", "UniformLayout", "UniformLinear", "tensor_bytes"]


class UniformEntry(LayerEntry):
    """The entry of a layer in config.json; the module's docstring explains it."""

    format: Literal["uniform"]
    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Size | None
    symmetric: bool
    zero_shift: Annotated[int, Field(ge=0, le=6)]
    scale_dtype: ScaleName
    activation: Activation | None = None
    rotation: InputRotation | None = None
    shares: Annotated[str, Field(min_length=1)] | None = None

    @property
    def layout(self) -> UniformLayout:
        return UniformLayout(self.bits, self.group_size, self.zero_shift)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        most = 0 if self.symmetric else 8 - self.bits
        if self.zero_shift > most:
            raise ValueError(
                f"zero_shift is {self.zero_shift}: allowed with bits {self.bits} and "
                f"symmetric {self.symmetric} are 0 to {most}"
            )
        if self.rotation is None and self.shares is not None:
            raise ValueError(
                f"shares is {self.shares}: allowed is null for a layer that does not rotate its "
                "inputs, since it has nothing to share"
            )
        if self.rotation is not None:
            try:
                self.rotation.of_width(self.shape[1])
            except ValueError as error:
                raise ValueError(f"rotation: {error}") from None
        self.check_bytes(tensor_bytes(**self.model_dump(exclude={"format", "bias"})))
        return self


def tensor_bytes(
    shape: list[int] | tuple[int, int],
    bits: int,
    group_size: int | None,
    symmetric: bool,
    zero_shift: int,
    scale_dtype: str,
    **free: Any,
) -> int:
    """Returns `UniformLinear.weight_bytes()` of the layer that an entry describes:

    out * ceil(in * bits / 8) + out * groups * (2 or 4) + groups * ceil(out * zbits / 8)

    These are the codes, the scales (2 for float16) and, unless symmetric, the zeros, with
    zbits = bits + zero_shift.

    free: the other fields of the entry, which take no bytes.
    """
    rows, columns = shape
    groups = reference.group_count(columns, group_size)
    scales = rows * groups * getattr(torch, scale_dtype).itemsize
    zeros = 0 if symmetric else groups * packed_bytes(rows, bits + zero_shift)
    return rows * packed_bytes(columns, bits) + scales + zeros


class UniformLinear(QuantizedLinear):
    """A linear layer in the uniform format; the module's docstring gives its byte layout."""

    format = "uniform"
    Entry = UniformEntry
    backends = (Cpu(), Triton(), reference.Reference())
    vectors = ("scale",)
    shared_fields = ("rotation", "activation")

    spec: UniformEntry
    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, spec: UniformEntry) -> None:
        super().__init__(spec)
        rows, columns = spec.shape
        self.activation = spec.activation
        self.rotation = None if spec.rotation is None else spec.rotation.of_width(columns)
        groups = reference.group_count(columns, spec.group_size)
        self.add_frozen("packed", (rows, packed_bytes(columns, spec.bits)), "uint8")
        self.add_frozen("scale", (rows, groups), spec.scale_dtype)
        width = packed_bytes(rows, spec.bits + spec.zero_shift)
        self.add_frozen("zero", (groups, width), None if spec.symmetric else "uint8")

    def entry(self) -> dict[str, Any]:
        """Returns the entry with the layer's present `activation`, which methods may set."""
        entry = super().entry()
        entry.pop("activation", None)
        rounding = {} if self.activation is None else {"activation": self.activation.model_dump()}
        return entry | rounding

    def with_reading(self, how: Reading, shares: str | None = None) -> Self:
        """Returns a layer with the same tensors that reads its input in another way.

        The new layer is not linked to an owner.

        how: the way. With a rotation, the codes are taken for those of the rotated weight.
        shares: name of a layer that reads the same input in the same way; only with a rotation.
        """
        entry = {k: v for k, v in self.entry().items() if k not in ("activation", "rotation")}
        if how.activation is not None:
            entry["activation"] = how.activation.model_dump()
        if how.entry is not None:
            entry |= {"rotation": how.entry.model_dump(), "shares": shares}
        with torch.device("meta"):
            made = self.from_entry(entry)
        made.load_state_dict(self.state_dict(), assign=True)
        return made

    @property
    def reading(self) -> Reading:
        """How the layer reads its input."""
        return Reading(self.activation, self.rotation)

    def quantized_input(self, x: Tensor) -> Tensor:
        return self.reading.seen(x)

    @property
    def shares(self) -> str | None:
        return self.spec.shares

    @property
    def owner(self) -> QuantizedLinear:
        """The linked owner; else the layer itself, which can compute all that its owner can."""
        return self._owner[0] if self._owner else self

    def prepare(self, x: Tensor) -> Tensor:
        """Rotates and rounds the input.

        x: (..., in).

        Returns (..., in): in the dtype of x if the layer does not rotate it; else in float64 if x
        is, in float32 on a CPU, and in the dtype of x on other devices.
        """
        if self.rotation is None:
            return self.quantized_input(x)
        return self.reading.prepared(x).to(product_dtype(x))

    def shared_tensors(self) -> list[Tensor]:
        return super().shared_tensors() if self.rotation is None else []

    @classmethod
    def from_grid(
        cls,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        layout: UniformLayout,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Rounds a float weight to the nearest codes, given scale and zero as they will be stored.

        weight: (out, in).
        scale: (out, groups).
        zero: (out, groups), in units of codes; clamped to the range of the codes and rounded to
            multiples of 2**-zero_shift. None: the layer is symmetric.
        bias, dtype: as for `from_codes`.
        """
        scale, unit, bits = storable(scale), 2.0**-layout.zero_shift, layout.bits
        if zero is None:
            points = reference.zero_points(None, scale, bits, 0)
        else:
            zero = (finite("zero", zero).clamp(0, 2**bits - 1) / unit).round().to(torch.uint8)
            points = zero * unit
        weight = finite("weight", weight)
        codes = reference.quantize(weight, scale, points, bits, layout.group_size)
        return cls.from_codes(codes, scale, zero, layout, bias=bias, dtype=dtype)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        layout: UniformLayout,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Returns a layer with these codes.

        codes: (out, in) uint8.
        scale: (out, groups).
        zero: (out, groups) of an integer dtype, in units of 2**-zero_shift; None: symmetric.
        bias: (out,), kept in its dtype.
        dtype: dtype of the original float weight; None: unknown.
        """
        scale = storable(scale)
        layer = cls.empty(
            codes.shape,
            bias,
            codes.device,
            dtype,
            symmetric=zero is None,
            scale_dtype=dtype_name(scale.dtype),
            **asdict(layout),
        )
        check_shape("scale", scale, layer.scale.shape)
        if zero is not None:
            check_shape("zero", zero, layer.scale.shape)
            zero = _packed_zeros(zero, layout.bits + layout.zero_shift)
        packed = pack(codes, layout.bits)
        layer.store({"packed": packed, "scale": scale, "zero": zero, "bias": bias})
        return layer

    def codes(self) -> Tensor:
        """Returns the codes: (out, in) uint8."""
        return unpack(self.packed, self.spec.bits, self.in_features)

    def zeros(self) -> Tensor:
        """Returns the zero points in units of 2**-zero_shift: (out, groups) uint8."""
        spec = self.spec
        return reference.zero_points(self.zero, self.scale, spec.bits, spec.zero_shift).contiguous()

    def dequantize(self) -> Tensor:
        codes, scale = self.codes(), self.scale.float()
        weight = torch.empty_like(codes, dtype=torch.float32)
        reference.write_weight(weight, codes, scale, self.zeros(), self.spec.layout)
        return self.reading.restore_weight(weight)


def _packed_zeros(zero: Tensor, width: int) -> Tensor:
    """Packs zeros (out, groups) as they are stored: (groups, ceil(out * width / 8)) uint8."""
    if zero.is_floating_point():
        raise ValueError(f"zero is {zero.dtype}: allowed are integer dtypes")
    if int(zero.min()) < 0 or int(zero.max()) >= 2**width:
        raise ValueError(
            f"zero goes from {int(zero.min())} to {int(zero.max())}: allowed at {width} bits are "
            f"0 to {2**width - 1}"
        )
    return pack(zero.T.to(torch.uint8), width)
