"""Uniform grids: from the range of a group to scale and zero point, and rounding to them.

Grids are per group of `group_size` input channels of one output row (None: the whole row). The last
group of a row may be shorter; groups never straddle rows. OmniQuant section 3.2, equation 2; with
the corrections that the range always includes 0 and that zero points stay within the codes.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.kernels.straight_through import round_ste


class GridShape(NamedTuple):
    """What of a grid is chosen beforehand: the last arguments of the functions that make one."""

    bits: int
    group_size: int | None
    symmetric: bool
    zero_shift: int = 0


@dataclass(frozen=True)
class Grid:
    """scale, zero: (out, groups) float32; zero in multiples of 2^-zero_shift, None for symmetric.

    Code q stands for scale * (q - zero); symmetric grids have their zero at 2^(bits - 1).
    """

    scale: Tensor
    zero: Tensor | None
    _: KW_ONLY
    bits: int
    group_size: int | None
    zero_shift: int = 0

    @property
    def top(self) -> int:
        return 2**self.bits - 1


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """(out, in) -> (out, groups, group_size), a ragged last group padded with its own last value.

    Repeating a value changes neither minimum nor maximum.
    """
    rows, columns = weight.shape
    size = min(group_size or columns, columns)
    missing = -columns % size
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(rows, missing)], 1)
    return weight.view(rows, -1, size)


def ungrouped(values: Tensor, columns: int) -> Tensor:
    """The inverse of `grouped`: (out, groups, group_size) -> (out, columns)."""
    return values.flatten(1)[:, :columns]


def extremes(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every group, (out, groups), forced to include 0."""
    values = grouped(weight, group_size)
    return values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)


def grid_from_range(
    low: Tensor,
    high: Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    zero_shift: int = 0,
) -> Grid:
    """The grid that spans [low, high]; low <= 0 <= high, (out, groups). Differentiable in both."""
    top = 2**bits - 1
    if symmetric:
        # 2^bits - 1 steps, one more of them below zero: the error stays within half a step.
        reach = torch.maximum(high, -low)
        scale = _positive(2 * reach / top, reach)
        return Grid(scale, None, bits=bits, group_size=group_size)
    scale = _positive((high - low) / top, high - low)
    step = 2.0**-zero_shift
    zero = (torch.round(-low / scale / step) * step).clamp(0, top).detach()
    return Grid(scale, zero, bits=bits, group_size=group_size, zero_shift=zero_shift)


def minmax_grid(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, zero_shift: int = 0
) -> Grid:
    """Round-to-nearest's grid: the whole range of every group."""
    ends = extremes(weight, group_size)
    return grid_from_range(*ends, bits, group_size, symmetric, zero_shift)


def _positive(scale: Tensor, reach: Tensor) -> Tensor:
    """An all-zero group gets the scale 1: its codes are the zero point."""
    return torch.where(reach > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """weight rounded to the grid, (out, in); gradients pass to the weight and to the grid's scale.

    A clamped weight has gradient only through the scale, as in LSQ.
    """
    values = grouped(weight, grid.group_size)
    scale = grid.scale.unsqueeze(-1)
    zero = 2.0 ** (grid.bits - 1) if grid.zero is None else grid.zero.unsqueeze(-1)
    codes = nearest_code(values / scale, zero, round_ste).clamp(0, grid.top)
    return ungrouped((codes - zero) * scale, weight.shape[1])


def nearest_code(
    steps: Tensor, zero: Tensor | float, rounded: Callable[[Tensor], Tensor] = torch.round
) -> Tensor:
    """The code nearest to steps + zero, not clamped. Ties depend on what of zero is a fraction
    alone: a whole zero point only moves the codes."""
    fraction = zero % 1
    return rounded(steps + fraction) + (zero - fraction)
