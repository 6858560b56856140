"""Clip the ranges of weights: by learning (OmniQuant, section 3.2) or by search (as in AWQ)."""

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
RATIOS = tuple(1 - 0.05 * step for step in range(11))  # the shares of a range that are tried
WIDEST = 0.998  # the largest initial ratio: at 1 the sigmoid has no gradient
TILE = 2**18  # weights of a tile of rows, 1 MiB


class LearnedClipping(nn.Module):
    """Learnable clipping of the range of every group, one logit for each end.

    The clipped range is [sigmoid(low) * min, sigmoid(high) * max].

    low, high: (out, groups) float32, the initial logits.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.low = nn.Parameter(low.detach().clone())
        self.high = nn.Parameter(high.detach().clone())

    @classmethod
    def start(cls, weight: Tensor, group_size: int | None) -> "LearnedClipping":
        """Returns OmniQuant's initial values for a weight (out, in)."""
        logits = torch.full_like(extremes(weight, group_size)[0], START)
        return cls(logits, logits)

    @classmethod
    def from_ratios(cls, low: Tensor, high: Tensor) -> "LearnedClipping":
        """Returns the clipping whose initial range is [low * min, high * max] in every group.

        low, high: (out, groups) float32, in (0, 1]. Values are clamped to [0.002, 0.998], because
            the sigmoid has no gradient at 0 and 1.
        """
        ratios = (r.clamp(1 - WIDEST, WIDEST) for r in (low, high))
        return cls(*(torch.logit(r) for r in ratios))

    def grid(self, weight: Tensor, shape: GridShape) -> Grid:
        """Returns the grid of the clipped ranges, differentiable in the logits and the weight."""
        return self.within(*extremes(weight, shape.group_size), shape)

    def within(self, low: Tensor, high: Tensor, shape: GridShape) -> Grid:
        """Returns the grid of the clipped ranges, given those that are clipped, (out, groups)."""
        return grid_from_range(
            torch.sigmoid(self.low) * low, torch.sigmoid(self.high) * high, *shape
        )


def rounding_error(weight: Tensor, grid: Grid) -> Tensor:
    """Returns the squared error of rounding a weight (out, in) to the nearest codes of a grid."""
    return (fake_quantize(weight, grid) - weight).square()


def search_clipping(
    weight: Tensor,
    importance: Tensor,
    shape: GridShape,
    ratios: Sequence[float] = RATIOS,
    squared_error: Callable[[Tensor, Grid], Tensor] = rounding_error,
) -> tuple[Tensor, Tensor]:
    """Searches the shares of each group's range that give the least weighted squared error.

    Both ends are first clipped by the same ratio. Then each end is varied alone, unless the grid is
    symmetric.

    weight: (out, in).
    importance: (in,), the mean square of each input channel. The weighted error is then the error
        of the output, if channels are uncorrelated.
    shape: the settings of the grid.
    ratios: the shares to try.
    squared_error: returns the squared error (out, in) of rounding a weight to a grid.

    Returns the ratios of the lower and the upper end, (out, groups) each.
    """
    tile = len(weight)
    if weight.device.type == "cpu":  # a tile stays in the second-level cache during all tries
        tile = TILE // max(1, weight.shape[1])
    parts = weight.split(max(1, tile))
    with torch.no_grad():
        found = [_search(part, importance, shape, ratios, squared_error) for part in parts]
    low, high = (torch.cat(each) for each in zip(*found, strict=True))
    return low, high


def _search(
    weight: Tensor,
    importance: Tensor,
    shape: GridShape,
    ratios: Sequence[float],
    squared_error: Callable[[Tensor, Grid], Tensor],
) -> tuple[Tensor, Tensor]:
    """Searches the ratios of some rows; the arguments are those of `search_clipping`."""
    low, high = extremes(weight, shape.group_size)
    best_low, best_high = torch.ones_like(low), torch.ones_like(high)
    least = torch.full_like(low, float("inf"))

    def attempt(try_low: Tensor, try_high: Tensor) -> None:
        nonlocal best_low, best_high, least
        grid = grid_from_range(try_low * low, try_high * high, *shape)
        error = _group_sums(squared_error(weight, grid) * importance, shape.group_size)
        better = error < least
        best_low = torch.where(better, try_low, best_low)
        best_high = torch.where(better, try_high, best_high)
        least = torch.where(better, error, least)

    for ratio in ratios:
        attempt(torch.full_like(low, ratio), torch.full_like(high, ratio))
    if not shape.symmetric:
        for ratio in ratios:
            attempt(torch.full_like(low, ratio), best_high)
        for ratio in ratios:
            attempt(best_low, torch.full_like(high, ratio))
    return best_low, best_high


def clipped_grid(weight: Tensor, importance: Tensor, shape: GridShape) -> Grid:
    """Returns the grid of the ranges that `search_clipping` finds."""
    low_ratio, high_ratio = search_clipping(weight, importance, shape)
    low, high = extremes(weight, shape.group_size)
    return grid_from_range(low_ratio * low, high_ratio * high, *shape)


def _group_sums(values: Tensor, group_size: int | None) -> Tensor:
    """Returns the sum over each group: (out, in) -> (out, groups)."""
    columns = values.shape[1]
    size = min(group_size or columns, columns)
    missing = -columns % size
    if missing:  # zeros add nothing
        values = nn.functional.pad(values, (0, missing))
    return grouped(values, size).sum(-1)
