from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lowbit.blocks import Fold
from lowbit.blocks.statistics import ChannelStatistics
from lowbit.solvers.equivalence import ALPHAS, FLOOR, middle_shift, searched_scale, smooth_scale
from lowbit.solvers.rounding import fake_quantize, minmax_grid

NORM = Fold("norm", "n", ("a", "b"), 16)
# Key heads of 4 channels, each read by two query heads.
HEADS = torch.arange(8).view(2, 4).repeat_interleave(2, 0).flatten()
ROWS = Fold("values", "v", ("a",), 8, reader_channels=HEADS)
ROTARY = Fold("rotary", "a", ("b",), 5)


def matrices() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        f"{n}.weight": torch.randn(rows, 16, generator=draw) for n, rows in (("a", 12), ("b", 4))
    }


def statistics(seed: int = 1, loud: float = 30.0) -> ChannelStatistics:
    """Of inputs with a few loud channels."""
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(seed))
    x[:, ::5] *= loud
    found = ChannelStatistics.empty(16, torch.device("cpu"))
    found.update(x)
    return found


def nearest(reader: str, weight: Tensor) -> Tensor:
    return fake_quantize(weight, minmax_grid(weight, 3, 8, False))


def error(name: str, weight: Tensor) -> Tensor:
    return (nearest(name, weight) - weight).square()


def halves(fold: Fold, columns: Tensor) -> Tensor:
    """The maximum of every free channel, one by one."""
    if fold.reader_channels is None:
        return columns
    return torch.stack([columns[fold.reader_channels == i].max() for i in range(fold.size)])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("fold", [NORM, ROWS], ids=["norm", "grouped queries"])
def test_smoothquants_formula_over_all_readers(fold: Fold, alpha: float) -> None:
    t, seen = matrices(), {"a": statistics(1), "b": statistics(2)}
    a = torch.stack([seen[r].absmax for r in fold.readers]).amax(0)
    w = torch.cat([t[f"{r}.weight"] for r in fold.readers]).abs().amax(0)
    wanted = halves(fold, a) ** alpha / halves(fold, w) ** (1 - alpha)
    found = smooth_scale(fold, t, seen, alpha)
    assert found.shape == (fold.size,)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("fold", [NORM, ROWS], ids=["norm", "grouped queries"])
def test_a_shift_is_the_middle_and_the_scale_follows_what_is_left(fold: Fold) -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(3)) + torch.arange(16)
    found = ChannelStatistics.empty(16, torch.device("cpu"))
    found.update(x)
    seen = dict.fromkeys(fold.readers, found)
    high, low = halves(fold, x.amax(0)), -halves(fold, -x.amin(0))
    shift = middle_shift(fold, seen, torch.device("cpu"))
    torch.testing.assert_close(shift, (high + low) / 2)
    w = torch.cat([matrices()[f"{r}.weight"] for r in fold.readers]).abs().amax(0)
    wanted = ((high - low) / 2 / halves(fold, w)) ** 0.5
    torch.testing.assert_close(smooth_scale(fold, matrices(), seen, 0.5, shift), wanted)
    assert not middle_shift(fold, {}, torch.device("cpu")).any()


def test_a_reader_without_statistics_counts_by_its_weight() -> None:
    """The router of a mixture: no group's linear, but it reads the norm."""
    t = matrices()
    t["b.weight"] *= 100
    seen = statistics()
    found = smooth_scale(NORM, t, {"a": seen}, 0.5)
    largest = torch.cat([t["a.weight"], t["b.weight"]]).abs().amax(0)
    torch.testing.assert_close(found, (seen.absmax / largest).sqrt())
    torch.testing.assert_close(smooth_scale(NORM, t, {}, 0.5), largest**-0.5)  # no expert saw one


def test_dead_channels_do_not_blow_up() -> None:
    t, seen = matrices(), statistics()
    seen.absmax[2], seen.absmean[2] = 0, 0
    for weight in t.values():
        weight[:, 3] = 0
    found = smooth_scale(NORM, t, {"a": seen}, 0.5)
    assert found.isfinite().all() and found.min() >= FLOOR
    assert found[3] == pytest.approx(float((seen.absmax[3] / FLOOR).sqrt()))
    assert searched_scale(NORM, t, {"a": seen}, error).isfinite().all()


@pytest.mark.parametrize(
    "scale",
    [partial(smooth_scale, alpha=0.5), partial(searched_scale, squared_error=error)],
)
def test_queries_against_keys_start_at_1(scale: Callable[..., Tensor]) -> None:
    assert torch.equal(scale(ROTARY, matrices(), {"b": statistics()}), torch.ones(5))


def measure(
    fold: Fold, t: dict[str, Tensor], seen: dict[str, ChannelStatistics], s: Tensor
) -> float:
    columns = s if fold.reader_channels is None else s[fold.reader_channels]
    return sum(
        float(
            (
                (nearest(r, t[f"{r}.weight"] * columns) / columns - t[f"{r}.weight"]) ** 2
                * n.square
            ).sum()
        )
        for r, n in seen.items()
    )


@pytest.mark.parametrize("loud", [1.0, 4.0, 30.0])
@pytest.mark.parametrize("fold", [NORM, ROWS], ids=["norm", "grouped queries"])
def test_the_searched_scale_is_the_best_of_its_family(fold: Fold, loud: float) -> None:
    t = matrices()
    seen = {r: statistics(i, loud) for i, r in enumerate(fold.readers)}
    found = searched_scale(fold, t, seen, error)
    a = halves(fold, torch.stack([s.absmean for s in seen.values()]).amax(0))
    tried = [a**alpha / (a.max() * a.min()) ** (alpha / 2) for alpha in ALPHAS]
    errors = [measure(fold, t, seen, scale) for scale in tried]
    least = measure(fold, t, seen, found)
    assert 0 in ALPHAS and least <= measure(fold, t, seen, torch.ones(fold.size))
    assert least == pytest.approx(min(errors), rel=1e-4)
    assert float(found.max() * found.min()) == pytest.approx(1, rel=1e-4)
    if loud > 10:
        assert least < 0.7 * errors[0]


def test_nothing_seen_is_a_scale_of_1() -> None:
    assert torch.equal(searched_scale(NORM, matrices(), {}, error), torch.ones(16))
