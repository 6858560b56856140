"""The definition of the uniform format's arithmetic, in torch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.kernels.bits import unpack


def group_count(in_features: int, group_size: int | None) -> int:
    """Groups of a row; the last one may be shorter."""
    return 1 if group_size is None else -(-in_features // group_size)


def groups_of(matrix: Tensor, group_size: int | None) -> Iterator[tuple[Tensor, slice]]:
    """The groups of matrix: (out, in) as views (out, n, size), each with its columns of `scale`.

    Two views at most: the whole groups, and the shorter one that ends each row.
    """
    in_features = matrix.shape[1]
    size = min(group_size or in_features, in_features)
    whole = in_features // size
    yield matrix[:, : whole * size].unflatten(1, (whole, size)), slice(0, whole)
    if whole * size < in_features:
        yield matrix[:, whole * size :].unsqueeze(1), slice(whole, whole + 1)


def quantize(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int | None
) -> Tensor:
    """The nearest codes on a grid, ties to even; a group whose scale is 0 gets its zero point.

    weight: (out, in)  scale, zero: (out, groups), zero in steps of the grid, or between two of them
    ->  (out, in) uint8
    """
    codes = weight.to(torch.float32, copy=True)
    # A division by infinity is the 0 that a group without a scale should get, and never NaN.
    step = scale.float().masked_fill(scale == 0, torch.inf)
    fraction = zero % 1
    for group, columns in groups_of(codes, group_size):
        group.div_(step[:, columns, None]).add_(fraction[:, columns, None])
        group.round_().add_((zero - fraction)[:, columns, None])
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


def zero_points(zero: Tensor | None, scale: Tensor, bits: int, zero_shift: int) -> Tensor:
    """zero: as stored, or None if symmetric  ->  (out, groups) uint8, in units of 2**-zero_shift"""
    if zero is None:
        return torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    return unpack(zero, bits + zero_shift, scale.shape[0]).T


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int | None,
    zero_shift: int,
    in_features: int,
) -> Tensor:
    """scale * (code - zero / 2**zero_shift) in float32, where only the product is rounded.

    packed: (out, ceil(in * bits / 8)) uint8  scale: (out, groups)
    zero: (groups, ceil(out * (bits + zero_shift) / 8)) uint8, or None  ->  (out, in) float32
    """
    weight = unpack(packed, bits, in_features).float()
    offset = zero_points(zero, scale, bits, zero_shift).float() * 2.0**-zero_shift
    for group, columns in groups_of(weight, group_size):
        group.sub_(offset[:, columns, None]).mul_(scale[:, columns, None])
    return weight
