"""Multiplies by slices of the nested format with Triton's kernels."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.formats.nested.reference import CODES_AT_ONCE
from lowbit.formats.triton import TritonBackend, multiply_stream
from lowbit.kernels.bits import pack
from lowbit.kernels.slicing import MASTER_BITS, slice_codes, step

if TYPE_CHECKING:
    from lowbit.formats.nested import NestedLinear


class Triton(TritonBackend["NestedLinear"]):
    """Packs the slice at the present width, which then costs what uniform codes of it cost.

    A master at 8 bits, and a slice without an overflow, are read as they are stored.
    """

    def repack(self, layer: "NestedLinear") -> dict[str, Tensor]:
        spec = layer.spec
        made = {} if layer.zero is None else {"zero": layer.zeros()}
        if spec.resident == "master" and spec.bits < MASTER_BITS:
            parts = layer.master.split(max(1, CODES_AT_ONCE // layer.in_features))
            codes = (slice_codes(part, spec.bits, spec.extra_precision) for part in parts)
            made["packed"] = torch.cat([pack(part, _bits(layer)) for part in codes])
        elif layer.overflow is not None:
            made["packed"] = pack(layer.codes(), _bits(layer))
        return made

    def multiply(
        self, layer: "NestedLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        from lowbit.formats.nested import SYMMETRIC_ZERO
        from lowbit.kernels.triton.stream import Stream

        spec, unit = layer.spec, step(layer.spec.bits)
        stored = layer.master if spec.resident == "master" else layer.packed
        weight = Stream(
            packed.get("packed", stored),
            layer.in_features,
            _bits(layer),
            layer.scales().contiguous(),
            spec.group_size or layer.in_features,
            zero=packed.get("zero"),
            middle=SYMMETRIC_ZERO,
            zero_unit=1 / unit,
            factor=unit,
        )
        return multiply_stream(prepared, weight)


def _bits(layer: "NestedLinear") -> int:
    """Returns the bits of a code; the code 2**bits of extra precision needs one more."""
    spec = layer.spec
    more = spec.extra_precision and spec.bits < MASTER_BITS
    return spec.bits + (more and (spec.resident == "master" or spec.top_codes is not None))
