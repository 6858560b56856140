from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.solvers.refit import refit
from lowbit.solvers.rounding import Grid, grouped, ungrouped

CASES = {"a row": None, "whole groups": 8, "a short last group": 10}


def case(group_size: int | None, symmetric: bool) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """Returns a target, codes of steps of 64, a grid that fits them badly, and a Hessian."""
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(5, 24, generator=draw)
    inputs = torch.randn(200, 24, generator=draw) @ torch.randn(24, 24, generator=draw)
    groups = 1 if group_size is None else -(-24 // group_size)
    scale = torch.full((5, groups), 0.01)
    zero = None if symmetric else torch.full((5, groups), 100.0)
    grid = Grid(scale, zero, bits=8, group_size=group_size)
    codes = ((target / 0.02 + 128) / 64).round().clamp(0, 3) * 64
    return target, codes, grid, inputs.T @ inputs / 200


def values(codes: Tensor, grid: Grid) -> Tensor:
    zero = torch.full_like(grid.scale, 128.0) if grid.zero is None else grid.zero
    parts = grid.scale.unsqueeze(-1) * (grouped(codes, grid.group_size) - zero.unsqueeze(-1))
    return ungrouped(parts, codes.shape[1])


def errors(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Returns the squared error of each output, in float64."""
    lost = (target - values(codes, grid)).double()
    return ((lost @ hessian.double()) * lost).sum(1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", CASES.values(), ids=CASES)
def test_no_change_of_a_grid_is_better(group_size: int | None, symmetric: bool) -> None:
    target, codes, grid, hessian = case(group_size, symmetric)
    found = refit(target, codes, grid, hessian, torch.float32)
    least = errors(target, codes, found, hessian)
    before = errors(target, codes, grid, hessian)
    assert bool((least < before).all()) and least.sum() < 0.7 * before.sum()
    if symmetric:
        assert found.zero is None
    else:
        assert found.zero is not None and torch.equal(found.zero, found.zero.round())
    if group_size is None:  # several groups have not converged after two sweeps
        for factor in (0.98, 1.02):
            other = replace(found, scale=found.scale * factor)
            assert bool((errors(target, codes, other, hessian) > least).all())
        for move in () if found.zero is None else (-3, 3):
            other = replace(found, zero=found.zero + move)
            assert bool((errors(target, codes, other, hessian) > least).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_that_made_the_values_is_found(symmetric: bool) -> None:
    _, codes, grid, hessian = case(8, symmetric)
    made = Grid(grid.scale * 1.5, None if symmetric else grid.zero + 7, bits=8, group_size=8)
    wanted = values(codes, made)
    found = refit(wanted, codes, grid, hessian, torch.float32)
    before, after = (errors(wanted, codes, each, hessian) for each in (grid, found))
    assert bool((after < 0.2 * before).all())
    exact = refit(wanted, codes, made, hessian, torch.float32)
    assert torch.allclose(exact.scale, made.scale, rtol=1e-4)


DEGENERATE = {
    "equal codes": (torch.full((5, 24), 64.0), 1.0),
    "a target of zeros": (None, 0.0),
    "a target of the other sign": (None, -1.0),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_scales_stay_finite_and_positive(name: str) -> None:
    given, sign = DEGENERATE[name]
    target, codes, grid, hessian = case(8, False)
    codes = codes if given is None else given
    target = sign * target
    found = refit(target, codes, grid, hessian, torch.float16)
    assert bool((found.scale.isfinite() & (found.scale > 0)).all())
    assert found.zero is not None and 0 <= float(found.zero.min()) <= float(found.zero.max()) <= 255
    least, before = (errors(target, codes, each, hessian) for each in (found, grid))
    assert bool((least <= before * (1 + 1e-5)).all())


def test_scales_are_those_that_are_stored() -> None:
    target, codes, grid, hessian = case(8, False)
    found = refit(target, codes, grid, hessian, torch.float16)
    changed = found.scale != grid.scale
    assert torch.equal(found.scale.half().float()[changed], found.scale[changed])
