"""The definition of the nested format's arithmetic, in torch."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend
from lowbit.formats.tiles import by_rows, product_dtype
from lowbit.formats.uniform.reference import groups_of
from lowbit.kernels.bits import pack, packed_bytes, unpack
from lowbit.kernels.slicing import rounded_codes, slice_codes, step

if TYPE_CHECKING:
    from lowbit.formats.nested import NestedLinear

CODES_AT_ONCE = 2**20  # while slicing: what is needed besides stays at a few megabytes


class Reference(Backend["NestedLinear"]):
    """Slices and dequantizes some rows of the weight at a time and multiplies by them."""

    name = "reference"

    def repack(self, layer: "NestedLinear") -> dict[str, Tensor]:
        """`before`: (out,) int64 on the CPU, how many top codes the rows before have; only where
        there is an overflow, which has a bit for each of them."""
        spec = layer.spec
        if layer.overflow is None:
            return {}
        parts = layer.packed.split(max(1, CODES_AT_ONCE // layer.in_features))
        codes = (unpack(part, spec.bits, layer.in_features) for part in parts)
        counts = torch.cat([(part == 2**spec.bits - 1).sum(1) for part in codes])
        return {"before": (counts.cumsum(0) - counts).cpu()}

    def multiply(
        self, layer: "NestedLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        x = prepared.to(product_dtype(prepared))
        codes_of, stored = self._codes(layer, packed)

        def product(weight: Tensor, scale: Tensor, zero: Tensor, *stored: Tensor) -> Tensor:
            write_weight(weight, codes_of(*stored), scale, zero, layer.spec.group_size)
            return functional.linear(x, weight.to(x.dtype))

        sources = (layer.scale.float(), layer.zeros().float(), *stored)
        return by_rows(x, (layer.out_features, layer.in_features), product, sources)

    def _codes(
        self, layer: "NestedLinear", packed: dict[str, Tensor]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """What makes some rows of codes, in units of the master's, and of what rows it does."""
        spec, columns = layer.spec, layer.in_features
        if spec.resident == "master":
            extra = spec.extra_precision
            return lambda master: rounded_codes(master, spec.bits, extra), (layer.master,)
        if layer.overflow is None:
            unit = step(spec.bits)
            return lambda part: unpack(part, spec.bits, columns).mul_(unit), (layer.packed,)
        tops = top_codes(layer.overflow, spec.bits, spec.top_codes or 0)

        def codes(part: Tensor, before: Tensor) -> Tensor:
            sliced = unpack_slice(part, tops[int(before[0]) :], spec.bits, columns)
            return sliced.to(torch.int16).mul_(step(spec.bits))

        return codes, (layer.packed, packed["before"])


def write_weight(
    into: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, group_size: int | None
) -> None:
    """scale * (code - zero) in float32, where only the product is rounded.

    into: (out, in) float32  codes: (out, in) uint8 or int16, in units of the master's
    scale, zero: (out, groups) float32, the master's
    """
    into.copy_(codes)
    for group, point, unit in groups_of(into, group_size, zero, scale):
        group.sub_(point).mul_(unit)


def pack_slice(codes: Tensor, bits: int, extra_precision: bool) -> tuple[Tensor, Tensor]:
    """A slice in its own bits, and which of its top codes stand for one more.

    codes: (out, in) uint8, the master's
    -> packed (out, ceil(in * bits / 8)) uint8, overflow (ceil(top codes / 8),) uint8
    """
    rows, columns = codes.shape
    packed = codes.new_empty(rows, packed_bytes(columns, bits))
    above = [codes.new_empty(0)]
    at_once = max(1, CODES_AT_ONCE // columns)
    for part, into in zip(codes.split(at_once), packed.split(at_once), strict=True):
        kept = slice_codes(part, bits)
        into.copy_(pack(kept, bits))
        if extra_precision and step(bits) > 1:
            whole = slice_codes(part, bits, extra_precision=True)
            above.append((whole - kept)[kept == 2**bits - 1])
    return packed, pack(torch.cat(above), 1)


def top_codes(overflow: Tensor, bits: int, count: int) -> Tensor:
    """What the codes of 2**bits - 1 in `packed` stand for: that, or 2**bits.  ->  (count,) uint8"""
    return unpack(overflow, 1, count).add_(2**bits - 1)


def unpack_slice(packed: Tensor, tops: Tensor | None, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack_slice`, for some rows: (out, in) uint8, up to 2**bits with `tops`.

    tops: from `top_codes`, beginning at these rows; None: there is no overflow.
    """
    sliced = unpack(packed, bits, in_features)
    return sliced if tops is None else sliced.masked_scatter_(sliced == 2**bits - 1, tops)


def count_top_codes(codes: Tensor, bits: int) -> int:
    """How many of the master's codes have a slice at or above the top code."""
    return int((slice_codes(codes, bits) == 2**bits - 1).sum())
