"""The definition of the nested format's arithmetic, in torch."""

import torch
from torch import Tensor

from lowbit.formats.uniform.reference import groups_of
from lowbit.kernels.bits import pack, packed_bytes, unpack
from lowbit.kernels.slicing import slice_codes, step

CODES_AT_ONCE = 2**20  # while slicing: what is needed besides stays at a few megabytes


def dequantize(
    sliced: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int | None
) -> Tensor:
    """scale * (sliced * step - zero) in float32, where only the product is rounded.

    sliced: (out, in) uint8, in units of the slice's step  scale: (out, groups), the master's
    zero: (out, groups) uint8, the master's  ->  (out, in) float32
    """
    weight = sliced.float().mul_(step(bits))
    for group, columns in groups_of(weight, group_size):
        group.sub_(zero[:, columns, None]).mul_(scale[:, columns, None])
    return weight


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


def unpack_slice(
    packed: Tensor, overflow: Tensor | None, bits: int, in_features: int, top_codes: int
) -> Tensor:
    """The inverse of `pack_slice`: (out, in) uint8, up to 2**bits where there is an overflow."""
    sliced = unpack(packed, bits, in_features)
    if overflow is not None:
        sliced[sliced == 2**bits - 1] += unpack(overflow, 1, top_codes)
    return sliced


def count_top_codes(codes: Tensor, bits: int) -> int:
    """How many of the master's codes have a slice at or above the top code."""
    return int((slice_codes(codes, bits) == 2**bits - 1).sum())
