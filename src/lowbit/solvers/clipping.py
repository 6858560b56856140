"""Clipping of weight ranges: learned (OmniQuant section 3.2) or searched (as AWQ does)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowbit.solvers.rounding import (
    Grid,
    GridShape,
    extremes,
    fake_quantize,
    grid_from_range,
    grouped,
)

START = 4.0  # sigmoid(4) = 0.982: OmniQuant's initial logit
RATIOS = tuple(1 - 0.05 * step for step in range(11))  # searched shares of a range
WIDEST = 0.998  # an initial ratio of 1 would have no gradient


class LearnedClipping(nn.Module):
    """One logit for the lower and one for the upper end of every group's range.

    low, high: (out, groups) float32; the range is [sigmoid(low) * min, sigmoid(high) * max].
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.low = nn.Parameter(low.detach().clone())
        self.high = nn.Parameter(high.detach().clone())

    @classmethod
    def start(cls, weight: Tensor, group_size: int | None) -> "LearnedClipping":
        """OmniQuant's initial values, for a weight (out, in)."""
        logits = torch.full_like(extremes(weight, group_size)[0], START)
        return cls(logits, logits)

    @classmethod
    def from_ratios(cls, low: Tensor, high: Tensor) -> "LearnedClipping":
        """ratios in (0, 1], (out, groups): the share of the range that is kept."""
        ratios = (r.clamp(1 - WIDEST, WIDEST) for r in (low, high))
        return cls(*(torch.logit(r) for r in ratios))

    def grid(self, weight: Tensor, shape: GridShape) -> Grid:
        """The grid of the clipped ranges; differentiable in the logits and in the weight."""
        low, high = extremes(weight, shape.group_size)
        return grid_from_range(
            torch.sigmoid(self.low) * low, torch.sigmoid(self.high) * high, *shape
        )


def search_clipping(
    weight: Tensor,
    importance: Tensor,
    shape: GridShape,
    ratios: Sequence[float] = RATIOS,
    rounded: Callable[[Tensor, Grid], Tensor] = fake_quantize,
) -> tuple[Tensor, Tensor]:
    """The ratios (low, high), (out, groups), with the least weighted squared error.

    importance: (in,) mean square of each input channel, so that the error is that of the output if
    channels were uncorrelated. Both ends are searched together, then each alone around the best.
    rounded: the weight that a grid leaves of it.
    """
    low, high = extremes(weight, shape.group_size)
    best_low, best_high = torch.ones_like(low), torch.ones_like(high)
    least = torch.full_like(low, float("inf"))

    def attempt(try_low: Tensor, try_high: Tensor) -> None:
        nonlocal best_low, best_high, least
        grid = grid_from_range(try_low * low, try_high * high, *shape)
        wrong = (rounded(weight, grid) - weight).square() * importance
        error = _group_sums(wrong, shape.group_size)
        better = error < least
        best_low = torch.where(better, try_low, best_low)
        best_high = torch.where(better, try_high, best_high)
        least = torch.where(better, error, least)

    with torch.no_grad():
        for ratio in ratios:
            attempt(torch.full_like(low, ratio), torch.full_like(high, ratio))
        if not shape.symmetric:
            for ratio in ratios:
                attempt(torch.full_like(low, ratio), best_high)
            for ratio in ratios:
                attempt(best_low, torch.full_like(high, ratio))
    return best_low, best_high


def clipped_grid(weight: Tensor, importance: Tensor, shape: GridShape) -> Grid:
    """The grid of the ranges that `search_clipping` finds."""
    low, high = search_clipping(weight, importance, shape)
    least, most = extremes(weight, shape.group_size)
    return grid_from_range(low * least, high * most, *shape)


def _group_sums(values: Tensor, group_size: int | None) -> Tensor:
    """Sums over groups, (out, groups); a ragged last group is padded with zeros."""
    columns = values.shape[1]
    size = min(group_size or columns, columns)
    padded = nn.functional.pad(values, (0, -columns % size))
    return grouped(padded, size).sum(-1)
