"""The reference of the uniform format: its arithmetic in plain torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend
from lowbit.formats.checks import check_shape
from lowbit.formats.tiles import by_rows, product_dtype
from lowbit.kernels.bits import unpack

if TYPE_CHECKING:
    from lowbit.formats.uniform import UniformLinear


class Reference(Backend["UniformLinear"]):
    """Dequantizes a few rows of the weight at a time and multiplies by them."""

    name = "reference"

    def multiply(
        self, layer: "UniformLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        layout, x = layer.spec.layout, prepared.to(product_dtype(prepared))

        def product(weight: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
            codes = unpack(packed, layout.bits, layer.in_features)
            write_weight(weight, codes, scale, zero, layout)
            return functional.linear(x, weight.to(x.dtype))

        shape = layer.out_features, layer.in_features
        return by_rows(x, shape, product, (layer.packed, layer.scale.float(), layer.zeros()))


@dataclass(frozen=True)
class UniformLayout:
    """The grid of a layer.

    bits: width of a code, 2 to 8.
    group_size: number of inputs that share a scale and a zero point; None: a whole row.
    zero_shift: zero points are multiples of 2**-zero_shift codes.
    """

    bits: int
    group_size: int | None
    zero_shift: int = 0


def group_count(in_features: int, group_size: int | None) -> int:
    """Returns the number of groups of a row; the last group may be shorter."""
    return 1 if group_size is None else -(-in_features // group_size)


def groups_of(
    matrix: Tensor, group_size: int | None, *numbers: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Yields the groups of a matrix (out, in) as views (out, n, size), and the groups' numbers.

    numbers: tensors (out, groups), such as scales; yielded as (out, n, 1).

    Yields once for the whole groups, and once for the shorter groups that end the rows, if any.
    """
    rows, in_features = matrix.shape
    size = min(group_size or in_features, in_features)
    whole = in_features // size
    if whole * size == in_features:
        yield matrix.view(rows, whole, size), *(number.unsqueeze(2) for number in numbers)
        return
    parts = matrix[:, : whole * size].view(rows, whole, size)
    yield parts, *(number[:, :whole, None] for number in numbers)
    yield matrix[:, whole * size :].unsqueeze(1), *(number[:, whole:, None] for number in numbers)


def quantize(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int | None
) -> Tensor:
    """Rounds a weight to the nearest codes, ties to even. Where the scale is 0: to the zero point.

    weight: (out, in).
    scale: (out, groups).
    zero: (out, groups), in units of codes; it need not be an integer.

    Returns (out, in) uint8.
    """
    groups = group_count(weight.shape[1], group_size)
    check_shape("scale", scale, torch.Size((len(weight), groups)))
    codes = weight.to(torch.float32, copy=True)
    # A group whose scale is 0 is divided by infinity, because a division by 0 could give NaN.
    step = scale.float().masked_fill(scale == 0, torch.inf)
    fraction = zero % 1
    numbers = step, fraction, zero - fraction
    for group, unit, shift, point in groups_of(codes, group_size, *numbers):
        group.div_(unit).add_(shift).round_().add_(point)
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


def zero_points(zero: Tensor | None, scale: Tensor, bits: int, zero_shift: int) -> Tensor:
    """Returns the zero points in units of 2**-zero_shift: (out, groups) uint8.

    zero: the stored tensor; None: the layer is symmetric.
    scale: (out, groups).
    """
    if zero is None:
        return torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    return unpack(zero, bits + zero_shift, scale.shape[0]).T


def write_weight(
    into: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, layout: UniformLayout
) -> None:
    """Writes scale * (code - zero / 2**zero_shift) in float32; the difference is exact.

    into: (out, in) float32.
    codes: (out, in) uint8, overwritten.
    scale: (out, groups) float32.
    zero: (out, groups) uint8, in units of 2**-zero_shift.
    """
    small = layout.zero_shift == 0 and layout.bits < 8  # differences fit into one byte
    steps = codes.view(torch.int8) if small else into.copy_(codes)
    offset = zero.view(torch.int8) if small else zero.float().mul_(2.0**-layout.zero_shift)
    by_group = zip(
        groups_of(steps, layout.group_size, offset),
        groups_of(into, layout.group_size, scale),
        strict=True,
    )
    for (step, point), (weight, unit) in by_group:
        step.sub_(point)
        if small:
            weight.copy_(step)
        weight.mul_(unit)
