"""GPTQ on a given grid: never off the grid, better than rounding where inputs are correlated."""

import pytest
import torch

from lowbit.solvers.feedback import proxy_loss
from lowbit.solvers.gptq import gptq_codes, ordered_factor
from lowbit.solvers.rounding import fake_quantize, minmax_grid


def correlated_inputs(channels: int, tokens: int = 512) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels, generator=draw) / channels**0.5
    x = torch.randn(tokens, channels, generator=draw) @ mixing
    x[:, 3] *= 20  # an outlier channel, as large models have
    return x


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 16, 24])  # 24 leaves a ragged group of 16
def test_better_than_nearest(group_size: int | None, symmetric: bool, act_order: bool) -> None:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    x = correlated_inputs(64)
    hessian = x.T @ x / len(x)
    factor = ordered_factor(hessian, 0.01, act_order)
    assert factor is not None and sorted(factor.order.tolist()) == list(range(64))
    grid = minmax_grid(weight, 3, group_size, symmetric)
    codes, loss = gptq_codes(weight, grid, factor)
    assert codes.dtype == torch.uint8 and int(codes.max()) <= 7
    columns = torch.arange(64) // (group_size or 64)
    zero = 4.0 if grid.zero is None else grid.zero[:, columns]
    values = grid.scale[:, columns] * (codes.float() - zero)
    damped = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(64)
    assert loss == pytest.approx(proxy_loss(weight, values, damped), rel=1e-3)
    # Without the order the outlier comes nearly last, and nothing is left to make up for it.
    share = 0.8 if act_order else 1.0
    assert loss < share * proxy_loss(weight, fake_quantize(weight, grid), damped)


def test_the_outlier_is_rounded_first() -> None:
    x = correlated_inputs(64)
    factor = ordered_factor(x.T @ x / len(x), 0.01, act_order=True)
    assert factor is not None and factor.order[-1] == 3  # rounding goes from last to first


def test_no_factor_no_feedback() -> None:
    assert ordered_factor(torch.full((4, 4), float("inf")), 0.01, act_order=True) is None
