"""The definition of the uniform format's arithmetic, in torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend
from lowbit.formats.tiles import by_rows, product_dtype
from lowbit.kernels.bits import unpack

if TYPE_CHECKING:
    from lowbit.formats.uniform import UniformLinear


class Reference(Backend["UniformLinear"]):
    """Dequantizes some rows of the weight at a time and multiplies by them."""

    name = "reference"

    def multiply(
        self, layer: "UniformLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        layout, x = layer.spec.layout, prepared.to(product_dtype(prepared))
        stored, zero, scale = layer.packed, layer.zeros(), layer.scale.float()

        def product(tile: slice, weight: Tensor) -> Tensor:
            codes = unpack(stored[tile], layout.bits, layer.in_features)
            write_weight(weight, codes, scale[tile], zero[tile], layout)
            return functional.linear(x, weight.to(x.dtype))

        return by_rows((layer.out_features, layer.in_features), x.device, product)


@dataclass(frozen=True)
class UniformLayout:
    """How codes lie on their grid.

    bits: of a code, 2 to 8.
    group_size: inputs that share a scale and a zero point; None: a whole row.
    zero_shift: zero points are in units of 2**-zero_shift codes.
    """

    bits: int
    group_size: int | None
    zero_shift: int = 0


def group_count(in_features: int, group_size: int | None) -> int:
    """Groups of a row; the last one may be shorter."""
    return 1 if group_size is None else -(-in_features // group_size)


def groups_of(matrix: Tensor, group_size: int | None) -> Iterator[tuple[Tensor, slice]]:
    """The groups of matrix: (out, in) as views (out, n, size), each with its columns of `scale`.

    Two views at most: the whole groups, and the shorter one that ends each row.
    """
    rows, in_features = matrix.shape
    size = min(group_size or in_features, in_features)
    whole = in_features // size
    if whole * size == in_features:
        yield matrix.view(rows, whole, size), slice(0, whole)
        return
    yield matrix[:, : whole * size].view(rows, whole, size), slice(0, whole)
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


def write_weight(
    into: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, layout: UniformLayout
) -> None:
    """scale * (code - zero / 2**zero_shift) in float32, where only the product is rounded.

    into: (out, in) float32  codes: (out, in) uint8, overwritten  scale: (out, groups) float32
    zero: (out, groups) uint8, in units of 2**-zero_shift
    """
    small = layout.zero_shift == 0 and layout.bits < 8  # differences fit into one byte
    steps = codes.view(torch.int8) if small else into.copy_(codes)
    offset = zero.view(torch.int8) if small else zero.float().mul_(2.0**-layout.zero_shift)
    by_group = zip(
        groups_of(steps, layout.group_size), groups_of(into, layout.group_size), strict=True
    )
    for (step, columns), (weight, _) in by_group:
        step.sub_(offset[:, columns, None])
        if small:
            weight.copy_(step)
        weight.mul_(scale[:, columns, None])
