"""Rounding of activations, against a slow definition token by token."""

import pytest
import torch
from torch import Tensor

from lowbit.kernels.tokens import round_tokens

SIZES = {"plain": 1.0, "tiny": 1e-6, "minute": 1e-30, "large": 1e30}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_token(row: list[float], bits: int, symmetric: bool) -> list[float]:
    top = 2**bits - 1
    low, high = min(*row, 0.0), max(*row, 0.0)
    if symmetric:
        step, zero = 2 * max(high, -low) / top, 2 ** (bits - 1)
    else:
        step, zero = (high - low) / top, 0
        zero = round(-low / step) if step else 0
    step = step or 1.0
    return [(min(max(round(x / step) + zero, 0), top) - zero) * step for x in row]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_every_token_on_its_own_grid(bits: int, symmetric: bool, size: float) -> None:
    x = draw(3, 5, 17) * size * torch.logspace(-2, 2, 5).unsqueeze(1)
    found = round_tokens(x, bits, symmetric)
    assert found.shape == x.shape and found.dtype == x.dtype
    rows = [one_token(row.tolist(), bits, symmetric) for row in x.double().flatten(0, -2)]
    wanted = torch.tensor(rows).view_as(x)
    steps = x.abs().amax(-1, keepdim=True) / 2**bits
    same = (found - wanted).abs() < 1e-3 * steps
    assert float(same.float().mean()) > 0.9  # ties may fall either way: the largest is one
    reach = 2 * x.abs().amax(-1, keepdim=True) if symmetric else x.amax(-1) - x.amin(-1)
    step = reach.view(3, 5, 1) / (2**bits - 1)
    assert ((found - x).abs() <= 1.01 * step).all()  # a step: the zero point is rounded as well


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_is_always_a_value(symmetric: bool) -> None:
    """Tokens to one side of it, and tokens of nothing else."""
    x = torch.stack([5 + draw(16).abs(), -5 - draw(16).abs(), torch.zeros(16)])
    x[:, 3] = 0
    found = round_tokens(x, 4, symmetric)
    assert not found[:, 3].any() and not found[2].any()
    assert (found[0] >= 0).all() and (found[1] <= 0).all()
    assert zero_count(round_tokens(x[:, :3], 4, symmetric)[2]) == 3


def zero_count(x: Tensor) -> int:
    return int((x == 0).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype) -> None:
    x = draw(7, 33).to(dtype)
    assert torch.equal(round_tokens(x, 8), round_tokens(x.float(), 8).to(dtype))


def test_no_tokens() -> None:
    """An expert to which nothing is routed."""
    assert round_tokens(torch.empty(0, 8), 4).shape == (0, 8)


def test_a_token_does_not_see_its_neighbours() -> None:
    x = draw(4, 6, 16)
    alone = torch.stack([round_tokens(x[:, i], 4) for i in range(6)], 1)
    assert torch.equal(round_tokens(x, 4), alone)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_pass_straight_through_and_reach_the_range(symmetric: bool) -> None:
    x = draw(3, 40).requires_grad_()
    (round_tokens(x, 4, symmetric) * (towards := draw(3, 40, seed=1))).sum().backward()
    assert x.grad is not None
    inner = (x != x.amax(-1, keepdim=True)) & (x != x.amin(-1, keepdim=True))
    exact = torch.isclose(x.grad[inner], towards[inner])
    assert float(exact.float().mean()) > 0.9  # what is not clipped
    assert not torch.isclose(x.grad[~inner], towards[~inner]).all()
    zeros = torch.zeros(2, 5, requires_grad=True)
    round_tokens(zeros, 4, symmetric).sum().backward()
    assert zeros.grad is not None and zeros.grad.isfinite().all()
