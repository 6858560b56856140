"""One choice for each item, so that the losses are least and the costs within a limit."""

import math
from collections.abc import Sequence

import torch

MOST_CELLS = 2**16  # of the table over costs; one of an item takes as many bytes


def solve(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int
) -> list[int]:
    """Which option each item takes: the multiple-choice knapsack, by dynamic programming.

    costs, losses: of every option of every item. Costs are counted in their greatest common
    divisor, and then the choice is the best there is. Where the table would be longer than
    MOST_CELLS, they are counted in more, and rounded up: the limit is never passed, and what is
    missed of the best is what one cell per item could buy. A higher limit never makes it worse.
    Raises ValueError where not even the cheapest options are within the limit.
    """
    cheapest = [min(options) for options in costs]
    if sum(cheapest) > limit:
        raise ValueError(f"limit is {limit}: the cheapest options cost {sum(cheapest)}")
    extra = [[c - low for c in options] for options, low in zip(costs, cheapest, strict=True)]
    dearest = sum(max(options) for options in extra)
    divisor = math.gcd(*(c for options in extra for c in options)) or 1
    cell = max(divisor, -(-dearest // MOST_CELLS))
    in_cells = [[-(-c // cell) for c in options] for options in extra]
    # The table ends where everything can be had, whatever the limit.
    cells = min((limit - sum(cheapest)) // cell, sum(max(options) for options in in_cells))
    best = torch.zeros(cells + 1, dtype=torch.float64)  # least loss at a cost of up to so many
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
