"""The reference of the nested format: its arithmetic in plain torch."""

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

CODES_AT_ONCE = 2**20  # codes sliced at a time, so that temporary tensors take a few megabytes


class Reference(Backend["NestedLinear"]):
    """Slices and dequantizes a few rows of the weight at a time and multiplies by them."""

    name = "reference"

    def repack(self, layer: "NestedLinear") -> dict[str, Tensor]:
        """Finds where the bits of each row begin in the overflow, if there is one.

        Returns `before`: (out,) int64 on the CPU, the number of top codes in all earlier rows.
        """
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

        sources = (layer.scales().float(), layer.zeros().float(), *stored)
        return by_rows(x, (layer.out_features, layer.in_features), product, sources)

    def _codes(
        self, layer: "NestedLinear", packed: dict[str, Tensor]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """Returns a function that makes rows of 8-bit codes, and the tensors that it reads."""
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
    """Writes scale * (code - zero) in float32; the difference is exact.

    into: (out, in) float32.
    codes: (out, in) uint8 or int16, in units of the 8-bit codes.
    scale, zero: (out, groups) float32, of the 8-bit codes.
    """
    into.copy_(codes)
    for group, point, unit in groups_of(into, group_size, zero, scale):
        group.sub_(point).mul_(unit)


def pack_slice(codes: Tensor, bits: int, extra_precision: bool) -> tuple[Tensor, Tensor]:
    """Cuts a slice and packs it.

    codes: (out, in) uint8, those of the master.

    Returns packed (out, ceil(in * bits / 8)) uint8 and overflow (ceil(top codes / 8),) uint8, which
    marks the top codes that mean 2**bits.
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
    """Returns what each code 2**bits - 1 in `packed` means, that or 2**bits: (count,) uint8."""
    return unpack(overflow, 1, count).add_(2**bits - 1)


def unpack_slice(packed: Tensor, tops: Tensor | None, bits: int, in_features: int) -> Tensor:
    """Undoes `pack_slice` for a few rows.

    packed: (rows, ceil(in * bits / 8)) uint8.
    tops: the result of `top_codes`, from the first of these rows on; None: there is no overflow.

    Returns (rows, in) uint8, at most 2**bits with `tops` and 2**bits - 1 without.
    """
    sliced = unpack(packed, bits, in_features)
    return sliced if tops is None else sliced.masked_scatter_(sliced == 2**bits - 1, tops)


def count_top_codes(codes: Tensor, bits: int) -> int:
    """Returns how many of the master's codes have a slice of 2**bits - 1 or more."""
    return int((slice_codes(codes, bits) == 2**bits - 1).sum())
