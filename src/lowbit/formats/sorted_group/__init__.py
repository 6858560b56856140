"""Integer groups over sorted inputs, beside salient columns that stay float; inputs are rounded.

The inputs of a layer stand in a fixed order: first `kept` = in - salient ordinary ones, cut into
groups of `group_size` (the last one may be shorter; null: one group), then the salient ones. With
x' = x[permutation], or x where there is none, code c of a weight and code q of an input,

    y = sum over groups of scale_x * scale * (sum over the group of q * (c - 2**(bits - 1)))
        + sum over salient inputs of x' * salient + bias

scale_x is found anew for every token and every group, from that token alone: the largest |x'| of
the group / (2**(b - 1) - 1), and q = round(x' / scale_x), with b the bits of `activation`. Where
`activation` is null, inputs are not rounded. The tensors, row-major:

| name            | dtype              | shape                        | holds                      |
| --------------- | ------------------ | ---------------------------- | -------------------------- |
| `packed`        | uint8              | (out, ceil(kept * bits / 8)) | a row's codes, in order    |
| `scale`         | as `scale_dtype`   | (out, groups)                | one for each group         |
| `salient`       | as `salient_dtype` | (out, salient)               | weights, or their codes    |
| `salient_scale` | as `scale_dtype`   | (out,)                       | only with int8: of a row   |
| `permutation`   | int16 or int32     | (in,)                        | see below                  |
| `bias`          | as `bias` says     | (out,)                       | absent if `bias` is null   |

groups = ceil(kept / group_size), or 1. Codes are unsigned, in little-endian bit streams as
`kernels/bits.py` says: at 4 bits, byte j of a row holds code 2j in its low and code 2j + 1 in its
high half. Without salient inputs there is no `salient` and no `salient_scale`; with int8, a salient
weight is salient_scale * code. Place i of the order holds input permutation[i]; int32 where
in > 32768. Numbers are little-endian. The entry in config.json:

    {"format": "sorted_group", "shape": [out, in],
     "bias": "float32" | "float16" | "bfloat16" | null,
     "bits": 2..8, "group_size": n | null, "scale_dtype": "float16" | "float32",
     "salient": n, "salient_dtype": "float16" | "float32" | "int8",
     "activation": {"bits": 2..8, "symmetric": true, "group": n | null} | null,
     "permutation": "stored" | null, "shares": NAME | null}

A null `permutation` is the model's own order (what makes the input was permuted instead). `shares`
names another layer of this format that reads the same input and agrees in `group_size`, `salient`,
`activation` and `permutation`; then the permutation is stored there alone. The group of
`activation` is `group_size`.
"""

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.checks import check_shape, dtype_name, finite, storable
from lowbit.formats.sorted_group import reference
from lowbit.formats.sorted_group.entry import (
    InputOrder,
    SortedGroupEntry,
    index_dtype,
    tensor_bytes,
)
from lowbit.formats.uniform.reference import group_count, quantize
from lowbit.kernels.bits import pack, packed_bytes, unpack

__all__ = ["InputOrder", "SortedGroupEntry", "SortedGroupLinear", "tensor_bytes"]

INT8_TOP = 127  # the largest code of a salient weight
SHARED = ("group_size", "salient", "activation", "permutation")


class SortedGroupLinear(QuantizedLinear):
    """A linear layer of integer groups and salient columns; see the module for its bytes."""

    format = "sorted_group"
    Entry = SortedGroupEntry

    spec: SortedGroupEntry
    packed: Tensor
    scale: Tensor
    salient: Tensor | None
    salient_scale: Tensor | None
    permutation: Tensor | None

    def __init__(self, spec: SortedGroupEntry) -> None:
        super().__init__(spec)
        rows, columns = spec.shape
        self.groups = group_count(spec.kept, spec.group_size)
        self.add_frozen("packed", (rows, packed_bytes(spec.kept, spec.bits)), "uint8")
        self.add_frozen("scale", (rows, self.groups), spec.scale_dtype)
        salient = spec.salient_dtype if spec.salient else None
        self.add_frozen("salient", (rows, spec.salient), salient)
        self.add_frozen("salient_scale", (rows,), spec.scale_dtype if salient == "int8" else None)
        owned = spec.permutation is not None and spec.shares is None
        index = dtype_name(index_dtype(columns)) if owned else None
        self.add_frozen("permutation", (columns,), index)

    @classmethod
    def from_grid(
        cls,
        weight: Tensor,
        scale: Tensor,
        order: InputOrder,
        *,
        bits: int,
        salient_bits: int = 16,
        shares: str | None = None,
        bias: Tensor | None = None,
    ) -> Self:
        """The nearest codes to a float weight, counted from the scale as it is stored.

        weight: (out, in), its columns in the order; the rest as `from_codes` takes it.
        """
        weight = finite("weight", weight)
        kept = weight.shape[1] - order.salient
        scale = storable(scale)
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
        codes = quantize(weight[:, :kept], scale, zero, bits, order.group_size)
        return cls.from_codes(
            codes,
            scale,
            weight[:, kept:],
            order,
            bits=bits,
            salient_bits=salient_bits,
            shares=shares,
            bias=bias,
        )

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        salient: Tensor,
        order: InputOrder,
        *,
        bits: int,
        salient_bits: int = 16,
        shares: str | None = None,
        bias: Tensor | None = None,
    ) -> Self:
        """codes: (out, kept) uint8  scale: (out, groups)  salient: (out, salient)  bias: (out,)

        salient_bits: 16 (float32 where float16 would overflow) or 8. shares: the name of the layer
        that has the permutation; `lowbit.formats.link` must find it there.
        """
        rows, columns = len(codes), codes.shape[1] + order.salient
        check_shape("salient", salient, torch.Size((rows, order.salient)))
        columns_kept, scale = _stored_salient(finite("salient", salient), scale, salient_bits)
        salient_dtype = dtype_name(columns_kept["salient"].dtype)
        stored: dict[str, Tensor | None] = {"packed": pack(codes, bits), "scale": scale}
        stored |= columns_kept if order.salient else {}
        if order.permutation is not None:
            checked = _checked(order.permutation, columns)
            stored |= {"permutation": checked} if shares is None else {}
        rounded = order.activation_bits is not None
        activation = {"bits": order.activation_bits, "symmetric": True, "group": order.group_size}
        return cls.from_tensors(
            (rows, columns),
            stored | {"bias": bias},
            bits=bits,
            group_size=order.group_size,
            scale_dtype=dtype_name(scale.dtype),
            salient=order.salient,
            salient_dtype=salient_dtype,
            activation=activation if rounded else None,
            permutation=None if order.permutation is None else "stored",
            shares=shares,
        )

    @property
    def shares(self) -> str | None:
        return self.spec.shares

    @property
    def owner(self) -> QuantizedLinear:
        """Itself where it is not linked and needs nothing that the owner holds."""
        if self._owner:
            return self._owner[0]
        if self.shares is None or self.spec.permutation is None:
            return self
        return super().owner

    def link(self, owner: QuantizedLinear) -> None:
        super().link(owner)
        assert isinstance(owner, SortedGroupLinear)
        for key in SHARED:
            here, there = getattr(self.spec, key), getattr(owner.spec, key)
            if here != there:
                self._owner = ()
                raise ValueError(
                    f"{key} is {here}, but {there} in {self.shares}, with which it shares"
                )

    def shared_tensors(self) -> list[Tensor]:
        return [] if self.permutation is None else [self.permutation]

    def codes(self) -> Tensor:
        """(out, kept) uint8"""
        return unpack(self.packed, self.spec.bits, self.spec.kept)

    def _signed(self) -> Tensor:
        return self.codes().float().sub_(2 ** (self.spec.bits - 1))

    def salient_weight(self) -> Tensor | None:
        """(out, salient) float32"""
        if self.salient is None or self.salient_scale is None:
            return None if self.salient is None else self.salient.float()
        return self.salient.float() * self.salient_scale.float().unsqueeze(1)

    def ordered(self) -> Tensor:
        """The weight with its columns in the order: (out, in) float32"""
        values = reference.scaled(self._signed(), self.scale.float(), self.spec.group_size)
        salient = self.salient_weight()
        return values if salient is None else torch.cat([values, salient], 1)

    def dequantize(self) -> Tensor:
        """The weight that `forward` multiplies `quantized_input` by: (out, in) float32

        Raises ValueError if the permutation is none.
        """
        return self._restored(self.ordered())

    def _restored(self, values: Tensor) -> Tensor:
        """values (..., in) in the order  ->  in the order of the inputs"""
        permutation = self.owner.get_parameter("permutation") if self.spec.permutation else None
        if permutation is None:
            return values
        return torch.empty_like(values).index_copy_(
            -1, _checked(permutation, self.in_features), values
        )

    def prepare(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., kept + groups + salient): codes, their scales, inputs that stay.

        In float32, or float64 for an x of float64. Where inputs are not rounded: x in the order.
        """
        x = x if x.dtype == torch.float64 else x.float()
        check_shape("x", x, torch.Size((*x.shape[:-1], self.in_features)))
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation.int())
        if self.spec.activation is None:
            return x
        rows = x.reshape(-1, self.in_features)
        kept, salient = rows.split([self.spec.kept, self.spec.salient], 1)
        parts = reference.quantize_input(kept, self.spec.activation.bits, self.spec.group_size)
        made = torch.cat([*parts, salient], 1)
        return made.view(*x.shape[:-1], made.shape[1])

    def quantized_input(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., in), rounded as in `forward`; float32, or float64 as x is."""
        prepared = self.prepared(x)
        if self.spec.activation is not None:
            codes, scale, salient = self._split(prepared)
            values = reference.scaled(codes, scale, self.spec.group_size)
            prepared = torch.cat([values, salient], 1).view(x.shape)
        return self._restored(prepared)

    def _split(self, prepared: Tensor) -> list[Tensor]:
        rows = prepared.reshape(-1, prepared.shape[-1])
        return list(rows.split([self.spec.kept, self.groups, self.spec.salient], 1))

    def forward(self, x: Tensor, prepare_only: bool = False) -> Tensor:
        """x: (..., in_features) -> (..., out_features), in the dtype of x."""
        if prepare_only:
            return self.prepare(x)
        prepared = self.prepared(x)
        # Half precision is slower than float32 on a CPU.
        dtype = prepared.dtype if x.device.type == "cpu" else x.dtype
        if self.spec.activation is None:
            y = functional.linear(prepared.to(dtype), self.ordered().to(dtype)).to(prepared.dtype)
        else:
            y = self._multiply(self._split(prepared), dtype)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _multiply(self, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
        spec = self.spec
        assert spec.activation is not None
        codes, scale, salient = inputs
        size = min(spec.group_size or spec.kept, spec.kept)
        exact = reference.exact_dtype(spec.bits, spec.activation.bits, size)
        y = reference.multiply((codes, scale), (self._signed(), self.scale), spec.group_size, exact)
        columns = self.salient_weight()
        if columns is not None:
            y = y + functional.linear(salient.to(dtype), columns.to(dtype)).to(y.dtype)
        return y


def _checked(permutation: Tensor, inputs: int) -> Tensor:
    """As int64, if it is a permutation of so many inputs."""
    numbers = permutation.detach().long()
    everything = torch.arange(inputs, device=numbers.device)
    if numbers.shape != (inputs,) or not torch.equal(numbers.sort().values, everything):
        raise ValueError(f"permutation is none of the {inputs} inputs: each must be in it once")
    return numbers


def _stored_salient(values: Tensor, scale: Tensor, bits: int) -> tuple[dict[str, Tensor], Tensor]:
    """values (out, salient) as they are stored, and the scale of the groups, in one dtype."""
    if bits == 16:
        fits = bool((values.abs() <= torch.finfo(torch.float16).max).all())
        return {"salient": values.half() if fits else values}, storable(scale)
    if bits != 8:
        raise ValueError(f"salient_bits is {bits}: allowed are 8 and 16")
    largest = torch.cat([values.abs(), values.new_zeros(len(values), 1)], 1).amax(1)
    both = storable(torch.cat([(largest / INT8_TOP).unsqueeze(1), scale.float()], 1))
    step = both[:, :1].float()
    codes = values / step.masked_fill(step == 0, torch.inf)
    codes = codes.round().clamp(-INT8_TOP, INT8_TOP).to(torch.int8)
    return {"salient": codes, "salient_scale": both[:, 0]}, both[:, 1:]
