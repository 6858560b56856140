"""Fake quantization: the values of torch bit by bit, and its gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.kernels.triton.fake_quantize import fake_quantize
from lowbit.solvers.rounding import Grid, grid_from_range
from lowbit.solvers.rounding import fake_quantize as by_torch

SHAPES = {"groups": (5, 64, 16), "ragged": (7, 37, 16), "rows": (3, 2500, None), "one": (1, 1, 8)}


def case(shape: tuple[int, int, int | None], bits: int, symmetric: bool) -> tuple[Tensor, Grid]:
    """A weight, and a grid that does not reach all of it."""
    (rows, columns, size), draw = shape, torch.Generator().manual_seed(bits)
    weight = torch.randn(rows, columns, generator=draw)
    groups = 1 if size is None else -(-columns // size)
    low, high = -torch.rand(rows, groups, generator=draw), torch.rand(rows, groups, generator=draw)
    return weight, grid_from_range(2 * low, 2 * high, bits, size, symmetric, 0 if symmetric else 1)


@pytest.mark.parametrize("symmetric", [False, True], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(
    shape: tuple[int, int, int | None], bits: int, symmetric: bool
) -> None:
    weight, grid = case(shape, bits, symmetric)
    draw = torch.Generator().manual_seed(1)
    gradient = torch.randn(weight.shape, generator=draw)

    def run(round_it) -> tuple[Tensor, ...]:
        w, scale = weight.clone().requires_grad_(), grid.scale.clone().requires_grad_()
        out = round_it(w, scale)
        return (out.detach(), *torch.autograd.grad(out, (w, scale), gradient))

    def torchs(w: Tensor, scale: Tensor) -> Tensor:
        return by_torch(w, replace(grid, scale=scale))

    found = run(lambda w, scale: fake_quantize(w, scale, grid.zero, bits, grid.group_size))
    values, of_weight, of_scale = run(torchs)
    assert torch.equal(found[0], values)
    torch.testing.assert_close(found[1], of_weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        found[2], of_scale, rtol=1e-4, atol=1e-5 * float(of_scale.abs().max())
    )
    assert (of_weight == 0).any() or weight.numel() == 1
