"""Multiple-choice knapsack: chooses one option for each item within a limit on the costs."""

import math
from collections.abc import Sequence

import torch

MOST_CELLS = 2**16  # longest table over costs; each item keeps one byte for each cell


def solve(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int
) -> list[int]:
    """Minimizes the sum of losses within a limit on the sum of costs, by dynamic programming.

    The table counts costs in units of their greatest common divisor; then the result is optimal.
    If the table would be longer than MOST_CELLS, the unit is larger and costs are rounded up. The
    limit is then still kept, and the result is at least as good as the best one for a limit that
    is lower by one unit per item. A higher limit never makes the result worse.

    costs: the cost of every option of every item, such as bytes.
    losses: the loss of every option of every item.
    limit: most that the chosen options may cost together.

    Returns the index of the chosen option of each item.
    Raises ValueError if not even the cheapest options are within the limit.
    """
    cheapest = [min(options) for options in costs]
    if sum(cheapest) > limit:
        raise ValueError(f"limit is {limit}: the cheapest options cost {sum(cheapest)}")
    extra = [[c - low for c in options] for options, low in zip(costs, cheapest, strict=True)]
    dearest = sum(max(options) for options in extra)
    divisor = math.gcd(*(c for options in extra for c in options)) or 1
    cell = max(divisor, -(-dearest // MOST_CELLS))
    in_cells = [[-(-c // cell) for c in options] for options in extra]
    # More cells than all dearest options cost are not needed, however high the limit is.
    cells = min((limit - sum(cheapest)) // cell, sum(max(options) for options in in_cells))
    best = torch.zeros(cells + 1, dtype=torch.float64)  # index: cost; value: least loss
    chosen = []
    for options, lost in zip(in_cells, losses, strict=True):
        table = torch.full((len(options), cells + 1), math.inf, dtype=torch.float64)
        for i, (cost, loss) in enumerate(zip(options, lost, strict=True)):
            if cost <= cells:
                table[i, cost:] = best[: cells + 1 - cost] + loss
        best, option = table.min(0)
        chosen.append(option.to(torch.uint8))
    left, picks = cells, []
    for options, option in zip(reversed(in_cells), reversed(chosen), strict=True):
        picks.append(int(option[left]))
        left -= options[picks[-1]]
    return picks[::-1]
