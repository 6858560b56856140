"""Scales, feedback and greedy passes of words, with half-integers in place of a codebook."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.methods.rotated import words
from lowbit.methods.rotated.words import DB_PER_BIT, Rounder, Spread, Words, spread
from lowbit.solvers.feedback import row_losses

SPREAD = Spread(
    size=1.0, ratios=(0.8, 1.0), rows="never", row_bits=0.1, stored=lambda s: s, passes=0
)


def nearest(target: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of half-integers from -1.5 to 1.5."""
    target = torch.nn.functional.pad(target, (0, 2 - target.shape[1]))
    codes = (target + 1.5).round().clamp(0, 3)
    return (4 * codes[:, 0] + codes[:, 1]).to(torch.uint8), codes - 1.5


def correlated(n: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4 * n, n, generator=draw) @ torch.randn(n, n, generator=draw)
    return x.T @ x / len(x)


def weight_of(rows: int, n: int) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(1))


def rounder_for(n: int) -> Rounder:
    return Rounder(correlated(n), n, 2, 0.01, torch.device("cpu"))


def spread_of(weight: Tensor, rounder: Rounder, **changes: Any) -> Words:
    generator = torch.Generator().manual_seed(2)
    return spread(weight, rounder, nearest, replace(SPREAD, **changes), generator)


def test_losses_are_those_of_scale_times_words() -> None:
    weight, rounder = weight_of(9, 16), rounder_for(16)
    for rows in ("never", "always"):
        found = spread_of(weight, rounder, rows=rows, passes=1)
        assert found.codes.shape == (9, 8) and found.scale.shape == (
            (9,) if rows == "always" else (1,)
        )
        error = weight - found.values * found.scale[:, None]
        torch.testing.assert_close(found.loss, row_losses(error, rounder.hessian))
        assert rounder.energy(weight) == pytest.approx(
            float(row_losses(weight, rounder.hessian).sum())
        )


def test_feedback_beats_plain_rounding_and_passes_spoil_no_row() -> None:
    weight, rounder = weight_of(32, 32), rounder_for(32)
    ones = torch.ones(32)
    plain = row_losses(weight - nearest(weight.view(-1, 2))[1].view(32, 32), rounder.hessian)
    found = rounder.round(weight, ones, nearest)
    assert found.loss.sum() < 0.8 * plain.sum()
    better = rounder.improve(weight, found, nearest, passes=2)
    assert (better.loss <= found.loss * (1 + 1e-5)).all() and better.loss.sum() < found.loss.sum()


@pytest.mark.parametrize("hessian", [None, torch.full((7, 7), torch.nan), torch.zeros(7, 7)])
def test_without_a_hessian_each_word_is_the_nearest(hessian: Tensor | None) -> None:
    rounder = Rounder(hessian, 7, 2, 0.01, torch.device("cpu"))
    assert not rounder.factored
    weight = weight_of(5, 7)
    found = spread_of(weight, rounder, passes=3, ratios=(1.0,))
    unit = torch.nn.functional.pad(weight / found.scale, (0, 1))
    assert torch.equal(found.values.view(-1, 2), nearest(unit.view(-1, 2))[1])


def test_columns_that_fill_a_word_cost_nothing() -> None:
    weight, hessian = weight_of(5, 7), correlated(7)
    rounder = Rounder(hessian, 7, 2, 0.01, torch.device("cpu"))
    found = rounder.round(weight, torch.ones(5), nearest)
    assert found.codes.shape == (5, 4) and found.values.shape == (5, 8)
    error = weight - found.values[:, :7]
    torch.testing.assert_close(found.loss, row_losses(error, rounder.hessian[:7, :7]))


def test_a_row_has_its_own_scale_where_that_is_worth_its_bits() -> None:
    rounder = rounder_for(16)
    weight = weight_of(200, 16)
    shared, own = (spread_of(weight, rounder, rows=r) for r in ("never", "always"))
    gained = 10 * math.log10(float(shared.loss.sum() / own.loss.sum()))
    assert gained > 0
    for bits, wanted in ((0.5 * gained / DB_PER_BIT, own), (2 * gained / DB_PER_BIT, shared)):
        found = spread_of(weight, rounder, rows="auto", row_bits=bits)
        assert torch.equal(found.scale, wanted.scale) and torch.equal(found.codes, wanted.codes)


def test_each_row_takes_the_best_ratio() -> None:
    weight, rounder = weight_of(12, 16), rounder_for(16)
    tried = [spread_of(weight, rounder, rows="always", ratios=(r,)).loss for r in (0.6, 1.0, 1.4)]
    found = spread_of(weight, rounder, rows="always", ratios=(0.6, 1.0, 1.4))
    torch.testing.assert_close(found.loss, torch.stack(tried).amin(0))
    one = spread_of(weight, rounder, ratios=(0.6, 1.0, 1.4))
    least = min(float(spread_of(weight, rounder, ratios=(r,)).loss.sum()) for r in (0.6, 1.0, 1.4))
    assert float(one.loss.sum()) == pytest.approx(least)


def test_scales_are_those_that_are_stored() -> None:
    weight, rounder = weight_of(12, 16), rounder_for(16)
    found = spread_of(weight, rounder, rows="always", stored=lambda s: (8 * s).round() / 8)
    assert not (8 * found.scale % 1).any()
    error = weight - found.values * found.scale[:, None]
    torch.testing.assert_close(found.loss, row_losses(error, rounder.hessian))


def test_rows_of_zeros_are_finite() -> None:
    weight, rounder = weight_of(6, 16), rounder_for(16)
    weight[2] = 0
    for rows in ("never", "always", "auto"):
        for w in (weight, torch.zeros(6, 16)):
            found = spread_of(w, rounder, rows=rows, passes=1)
            assert all(t.isfinite().all() for t in (found.values, found.scale, found.loss))
    assert rounder.energy(torch.zeros(6, 16)) == 0


@pytest.mark.parametrize("rows", ["never", "always"])
def test_rows_in_parts(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rounder = weight_of(11, 16), rounder_for(16)
    whole = spread_of(weight, rounder, rows=rows, passes=1)
    monkeypatch.setattr(words, "MOST_VALUES", 5 * 16)
    parts = spread_of(weight, rounder, rows=rows, passes=1)
    assert torch.equal(parts.scale, whole.scale) and parts.codes.shape == whole.codes.shape
    assert (parts.codes != whole.codes).float().mean() < 0.05  # sums in another order
    torch.testing.assert_close(parts.loss.sum(), whole.loss.sum(), rtol=0.02, atol=0)


def nearest_of_strips(target: Tensor) -> tuple[Tensor, Tensor]:
    """Half-integers, whose codes are those of four rows together; NaN counts for nothing."""
    codes, values = nearest(target.nan_to_num())
    return codes.view(-1, 4), values


@pytest.mark.parametrize("rows", ["never", "always", "auto"])
@pytest.mark.parametrize("count", [3, 4, 11])
def test_strips_of_rows(rows: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip takes one ratio; rows that fill the last strip are in no result."""
    weight, rounder = weight_of(count, 15), rounder_for(15)
    ratios = (0.6, 0.8, 1.0)
    strips = -(-count // 4)

    def found(n: int) -> Words:
        monkeypatch.setattr(words, "MOST_VALUES", n)
        how = replace(SPREAD, rows=rows, ratios=ratios, strip=4)
        draw = torch.Generator().manual_seed(2)
        return spread(weight, rounder, nearest_of_strips, how, draw)

    whole, parts = found(2**20), found(1)
    for w in (whole, parts):
        assert w.codes.shape == (strips, 8, 4) and w.values.shape == (count, 16)
        assert w.scale.shape in ((1,), (count,)) and w.values.isfinite().all()
        error = weight - w.values[:, :15] * w.scale[:, None]
        torch.testing.assert_close(w.loss, row_losses(error, rounder.hessian[:15, :15]))
    assert torch.equal(whole.scale, parts.scale)
    if rows == "always":
        tried = [spread_of(weight, rounder, rows=rows, ratios=(r,)).loss for r in ratios]
        of_strip = torch.nn.functional.pad(torch.stack(tried), (0, 4 * strips - count))
        least = of_strip.view(len(ratios), strips, 4).sum(-1).amin(0)
        got = torch.nn.functional.pad(whole.loss, (0, 4 * strips - count)).view(strips, 4).sum(-1)
        torch.testing.assert_close(got, least)
