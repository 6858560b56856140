"""Compares the knapsack with the best of all possible choices."""

import random
from itertools import product

import pytest

from lowbit.allocate import knapsack
from lowbit.allocate.knapsack import solve


def spent(values: list[list[float]], picks: list[int]) -> float:
    return sum(options[pick] for options, pick in zip(values, picks, strict=True))


def drawn(draw: random.Random, step: int) -> tuple[list[list[int]], list[list[float]]]:
    sizes = [draw.randint(1, 4) for _ in range(draw.randint(1, 5))]
    costs = [[step * draw.randint(0, 30) for _ in range(size)] for size in sizes]
    return costs, [[draw.random() for _ in range(size)] for size in sizes]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_within_the_limit_is_better(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(30):
        costs, losses = drawn(draw, step=3)
        cheapest = sum(map(min, costs))
        before = float("inf")
        for limit in (cheapest, cheapest + 10, cheapest + 61, cheapest + 500):
            picks = solve(costs, losses, limit)
            every = [list(p) for p in product(*(range(len(options)) for options in costs))]
            best = min(spent(losses, p) for p in every if spent(costs, p) <= limit)
            assert spent(costs, picks) <= limit
            assert spent(losses, picks) == pytest.approx(best, abs=1e-12)
            assert spent(losses, picks) <= before + 1e-12
            before = spent(losses, picks)


def test_a_coarse_table_never_passes_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "MOST_CELLS", 12)
    draw = random.Random(0)
    for _ in range(50):
        costs, losses = drawn(draw, step=1)
        before = float("inf")
        for more in range(0, 120, 7):
            picks = solve(costs, losses, sum(map(min, costs)) + more)
            assert spent(costs, picks) <= sum(map(min, costs)) + more
            assert spent(losses, picks) <= before + 1e-12
            before = spent(losses, picks)


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="limit is 6: the cheapest options cost 7"):
        solve([[3, 9], [4]], [[1.0, 0.0], [0.0]], 6)
