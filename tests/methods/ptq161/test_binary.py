"""Masks and binary weights: exact counts, the least squares, and what cannot get worse."""

import pytest
import torch
from torch import Tensor

from lowbit.methods.ptq161.binary import (
    Binary,
    alternated,
    binarized,
    refit_gain,
    salient_count,
    salient_mask,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(binary: Binary, weight: Tensor, importance: Tensor) -> float:
    return float(((weight - binary.weight()).square() * importance).sum())


@pytest.mark.parametrize(
    ("channels", "ratio", "alignment", "count"),
    [
        (4096, 0.2, 64, 832),
        (11008, 0.2, 64, 2176),
        (5120, 0.2, 64, 1024),
        (2048, 0.2, 64, 384),
        (256, 0.2, 64, 48),  # 64 would be a quarter too many, and so would 32
        (704, 0.2, 64, 128),
        (48, 0.2, 64, 10),
        (4096, 0.2, 1, 819),
        (7, 0.2, 64, 1),
        (3, 0.01, 64, 1),  # at least one
        (10, 0.99, 64, 9),  # one is left
        (1, 0.5, 64, 0),
        (4096, 0, 64, 0),
    ],
)
def test_the_count_is_aligned_within_a_tenth(
    channels: int, ratio: float, alignment: int, count: int
) -> None:
    assert salient_count(channels, ratio, alignment) == count


def test_the_mask_has_exactly_as_many_channels_also_in_a_tie() -> None:
    salience = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert salient_mask(salience, 3).tolist() == [False, True, True, True, False, False]
    for count in range(7):
        assert int(salient_mask(torch.ones(6), count).sum()) == count


@pytest.mark.parametrize("with_mean", [False, True])
def test_no_scale_and_no_sign_is_better(with_mean: bool) -> None:
    weight = draw(5, 40) + 0.3
    binary = binarized(weight, with_mean)
    best = error(binary, weight, torch.ones(40))
    assert bool(binary.mean.any()) == with_mean and (binary.column == 1).all()
    for factor in (0.99, 1.01):
        other = Binary(binary.row * factor, binary.mean, binary.column, binary.negative)
        assert error(other, weight, torch.ones(40)) > best
    for j in range(0, 40, 7):
        negative = binary.negative.clone()
        negative[:, j] ^= True
        other = Binary(binary.row, binary.mean, binary.column, negative)
        assert error(other, weight, torch.ones(40)) > best


def test_a_weight_of_zero_has_a_sign() -> None:
    binary = binarized(torch.tensor([[0.0, 2.0, -2.0, 0.0]]), with_mean=True)
    assert binary.signs().tolist() == [[1.0, 1.0, -1.0, 1.0]]


@pytest.mark.parametrize("with_mean", [False, True])
def test_no_round_makes_it_worse(with_mean: bool) -> None:
    """On columns of very different size, for which row scales alone are bad."""
    spread = draw(60, seed=1).exp()
    weight, importance = draw(24, 60) * spread, draw(60, seed=2).square()
    importance[:3] = 0  # channels that never are active
    rounds = [
        error(alternated(weight, importance, with_mean, n), weight, importance) for n in range(12)
    ]
    assert all(b <= a * (1 + 1e-5) for a, b in zip(rounds, rounds[1:], strict=False))
    plain = error(binarized(weight, with_mean), weight, importance)
    assert rounds[0] == pytest.approx(plain) and rounds[-1] < 0.75 * plain
    made = alternated(weight, importance, with_mean)
    assert (made.column > 0).all() and (made.row > 0).all()
    assert float(made.column.log().mean()) == pytest.approx(0, abs=1e-5)
    assert bool(made.mean.any()) == with_mean


def test_alternating_ends_at_the_least_squares() -> None:
    """Of each part, the others being fixed; solved here by numbers."""
    weight, importance = draw(6, 30), draw(30, seed=3).square() + 0.1
    binary = alternated(weight, importance, True, rounds=200)
    root = importance.sqrt()
    for i in range(6):
        basis = torch.stack([binary.signs()[i], torch.ones(30)], 1) * binary.column[:, None]
        solved = torch.linalg.lstsq(basis * root[:, None], (weight[i] * root)[:, None]).solution
        torch.testing.assert_close(
            torch.stack([binary.row[i], binary.mean[i]]), solved[:, 0], rtol=1e-3, atol=1e-4
        )
    unscaled = binary.signs() * binary.row[:, None] + binary.mean[:, None]
    best = (weight * unscaled).sum(0) / unscaled.square().sum(0)
    torch.testing.assert_close(binary.column, best, rtol=1e-2, atol=1e-3)


def test_degenerate_weights_stay_finite() -> None:
    weight = draw(6, 20)
    weight[0], weight[1], weight[:, 4] = 0, 3.0, 0
    weight[2] = weight[2].abs() + 1
    for importance in (torch.ones(20), torch.zeros(20)):
        for with_mean in (False, True):
            binary = alternated(weight, importance, with_mean)
            assert binary.weight().isfinite().all() and (binary.column > 0).all()
            assert not binary.weight()[0].any()
            best = error(binarized(weight, with_mean), weight, torch.ones(20))
            assert error(binary, weight, torch.ones(20)) <= best * (1 + 1e-5)


def test_refitting_takes_up_the_error_that_it_can() -> None:
    x = draw(300, 24) @ draw(24, 24, seed=1)
    mask = salient_mask(x.abs().amax(0), 6)
    hessian, weight = x.T @ x / len(x), draw(5, 24, seed=2)
    missed = weight[:, ~mask] - binarized(weight[:, ~mask], True).weight()
    gain = refit_gain(hessian, mask, damping=1e-6)
    assert gain is not None and gain.shape == (18, 6)
    # What the salient inputs can say about the outputs that are missed.
    solved = torch.linalg.lstsq(x[:, mask], x[:, ~mask] @ missed.T).solution.T
    torch.testing.assert_close(missed @ gain, solved, rtol=1e-2, atol=1e-2)


def test_a_hessian_that_will_not_factor_gives_no_gain() -> None:
    mask = torch.tensor([True, True, False])
    assert refit_gain(torch.full((3, 3), torch.nan), mask, 0.01) is None
    assert refit_gain(-torch.eye(3), mask, 0.01) is None


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_the_gain_is_damped(damping: float) -> None:
    x = draw(300, 24) @ draw(24, 24, seed=1)
    mask = salient_mask(x.abs().amax(0), 6)
    hessian = (x.T @ x / len(x)).double()
    inner = hessian[mask][:, mask]
    inner = inner + damping * inner.diagonal().mean() * torch.eye(6)
    wanted = torch.linalg.solve(inner, hessian[mask][:, ~mask]).T.float()
    gain = refit_gain(hessian.float(), mask, damping)
    assert gain is not None
    torch.testing.assert_close(gain, wanted, rtol=1e-3, atol=1e-4)
