import pytest
import torch
from torch import Tensor

from lowbit.methods.mixedquant.absorbing import split_hessian
from lowbit.solvers.feedback import row_losses
from lowbit.solvers.gptq import gptq_codes, ordered_factor
from lowbit.solvers.rounding import Grid, minmax_grid

ROUNDED, STAYS = 24, 6


def problem() -> tuple[Tensor, Tensor]:
    """A weight (10, 30) and the Hessian of correlated inputs."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 30, generator=draw) @ torch.randn(30, 30, generator=draw)
    return torch.randn(10, 30, generator=draw), x.T @ x / 400


def rounded(weight: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    return grid.scale.repeat_interleave(8, 1) * (codes.float() - 2 ** (grid.bits - 1))


def test_what_the_float_columns_take_up_is_the_most_they_can() -> None:
    weight, hessian = problem()
    split = split_hessian(hessian, ROUNDED, 1e-6)
    error = weight[:, :ROUNDED].sin()
    moved = weight[:, ROUNDED:] - split.absorbed(weight[:, ROUNDED:], error)
    gradient = torch.cat([error, moved], 1) @ hessian[:, ROUNDED:]
    assert gradient.abs().max() < 1e-3 * (error @ hessian[:ROUNDED, ROUNDED:]).abs().max()
    before = row_losses(torch.cat([error, torch.zeros(10, STAYS)], 1), hessian)
    assert (row_losses(torch.cat([error, moved], 1), hessian) < before).all()


def test_it_loses_less_than_rounding_alone() -> None:
    weight, hessian = problem()
    ordinary, stays = weight.tensor_split([ROUNDED], 1)
    grid = minmax_grid(ordinary, 3, 8, True)
    split = split_hessian(hessian, ROUNDED, 0.01)
    error = ordinary - rounded(ordinary, grid, gptq_codes(ordinary, grid, split.factor)[0])
    taken_up = torch.cat([error, stays - split.absorbed(stays, error)], 1)
    factor = ordered_factor(hessian[:ROUNDED, :ROUNDED], 0.01, True)
    alone = ordinary - rounded(ordinary, grid, gptq_codes(ordinary, grid, factor)[0])
    left = torch.cat([alone, torch.zeros(10, STAYS)], 1)
    assert row_losses(taken_up, hessian).sum() < 0.8 * row_losses(left, hessian).sum()


def test_nothing_stays_float() -> None:
    weight, hessian = problem()
    split, plain = split_hessian(hessian, 30, 0.01), ordered_factor(hessian, 0.01, True)
    assert torch.equal(split.factor.factor, plain.factor)
    assert split.absorbed(weight[:, 30:], weight).shape == (10, 0)


def test_what_will_not_factor() -> None:
    hessian = problem()[1]
    hessian[3, 28] = torch.inf
    assert split_hessian(hessian, ROUNDED, 0.01) is None
    assert split_hessian(torch.zeros(30, 30), ROUNDED, 0.01) is None


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_the_transfer_is_damped(damping: float) -> None:
    _, hessian = problem()
    inner = hessian[ROUNDED:, ROUNDED:] + damping * hessian.diagonal().mean() * torch.eye(STAYS)
    wanted = torch.linalg.solve(inner.double(), hessian[ROUNDED:, :ROUNDED].double()).float()
    split = split_hessian(hessian, ROUNDED, damping)
    torch.testing.assert_close(split.transfer, wanted, rtol=1e-3, atol=1e-4)
