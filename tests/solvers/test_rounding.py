from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.solvers.rounding import (
    Grid,
    extremes,
    fake_quantize,
    grid_from_range,
    grouped,
    minmax_grid,
    ungrouped,
)

OUTLIERS = {"plain": 1.0, "tiny": 1e-5, "near float32's end": 1e-36, "huge": 1e30}


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def pieces(matrix: Tensor, group_size: int | None) -> list[Tensor]:
    """Groups one by one, each (out, at most group_size): slow, plain and independent."""
    columns = matrix.shape[1]
    size = group_size or columns
    return [matrix[:, i : i + size] for i in range(0, columns, size)]


def spread(per_group: Tensor, group_size: int | None, columns: int) -> Tensor:
    """(out, groups) -> (out, in)."""
    return per_group.repeat_interleave(group_size or columns, 1)[:, :columns]


def codes(matrix: Tensor, grid: Grid) -> Tensor:
    """What fake_quantize stands for, in units of the scale and counted from 0."""
    scale = spread(grid.scale, grid.group_size, matrix.shape[1])
    zero = (
        torch.full_like(scale, 2.0 ** (grid.bits - 1))
        if grid.zero is None
        else spread(grid.zero, grid.group_size, matrix.shape[1])
    )
    return fake_quantize(matrix, grid) / scale + zero


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    matrix = weight(draw(st.integers(1, 6)), draw(st.integers(1, 40)), draw(st.integers(0, 99)))
    matrix = matrix * draw(st.sampled_from(list(OUTLIERS.values())))
    matrix += matrix.abs().max() * draw(st.sampled_from([0.0, 0.0, 5.0, -5.0]))
    options = {
        "bits": draw(st.integers(2, 8)),
        "group_size": draw(st.none() | st.integers(1, 50)),
        "symmetric": draw(st.booleans()),
    }
    return matrix, options | {"zero_shift": draw(st.integers(0, 8 - options["bits"]))}


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_weight_is_within_half_a_step(case: tuple[Tensor, dict[str, Any]]) -> None:
    matrix, options = case
    grid = minmax_grid(matrix, **options)
    top = 2 ** options["bits"] - 1
    steps = spread(grid.scale, options["group_size"], matrix.shape[1])
    wrong = (fake_quantize(matrix, grid) - matrix).abs() / steps
    # Also of what a rounded zero point pushes off the end of the grid.
    assert float(wrong.max()) <= 0.5 * (1 + 1e-4)
    found = codes(matrix, grid)
    torch.testing.assert_close(found, found.round(), atol=1e-3, rtol=0)
    assert found.min() > -0.5 and found.max() < top + 0.5
    if grid.zero is None:
        assert options["symmetric"]
    else:
        units = grid.zero * 2 ** options["zero_shift"]
        assert torch.equal(units, units.round())
        assert grid.zero.min() >= 0 and grid.zero.max() <= top
    assert grid.scale.shape == (len(matrix), len(pieces(matrix, options["group_size"])))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fine_zeros_place_the_grid_better(bits: int) -> None:
    matrix = weight(200, 64) + 0.3
    plain, fine = (minmax_grid(matrix, bits, 16, False, shift) for shift in (0, 8 - bits))
    wrong = [(fake_quantize(matrix, g) - matrix).square().mean() for g in (plain, fine)]
    assert torch.equal(plain.scale, fine.scale) and float(wrong[1] / wrong[0]) < 0.97
    whole = Grid(plain.scale, plain.zero, bits=bits, group_size=16, zero_shift=8 - bits)
    assert torch.equal(fake_quantize(matrix, whole), fake_quantize(matrix, plain))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_whole_range_and_no_more(bits: int, symmetric: bool) -> None:
    matrix = weight(50, 64)
    grid = minmax_grid(matrix, bits, None, symmetric)
    reach = matrix.abs().amax(1) * 2 if symmetric else matrix.amax(1) - matrix.amin(1)
    torch.testing.assert_close(grid.scale[:, 0], reach / (2**bits - 1))
    assert grid.top == 2**bits - 1


@pytest.mark.parametrize("magnitude", OUTLIERS.values(), ids=OUTLIERS)
def test_accuracy_is_relative(magnitude: float) -> None:
    matrix = weight(4, 64)
    wanted = fake_quantize(matrix, minmax_grid(matrix, 4, 16, False))
    found = fake_quantize(matrix * magnitude, minmax_grid(matrix * magnitude, 4, 16, False))
    torch.testing.assert_close(found / magnitude, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_one_sign_keep_zero_on_the_grid(sign: int, bits: int) -> None:
    """OmniQuant's code has zero points of -44 to -1964 here, which no code can hold."""
    matrix = sign * (5 + weight(6, 32).abs())
    low, high = extremes(matrix, None)
    assert not (low if sign > 0 else high).any()
    grid = minmax_grid(matrix, bits, None, False)
    assert grid.zero is not None
    assert torch.equal(grid.zero, torch.full_like(grid.zero, 0 if sign > 0 else grid.top))


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_rows_stay_zero(symmetric: bool) -> None:
    matrix = weight(3, 20)
    matrix[1] = 0
    matrix[2, 8:16] = 0
    for bits in (2, 8):
        grid = minmax_grid(matrix, bits, 8, symmetric)
        assert (grid.scale[1] == 1).all() and grid.scale[2, 1] == 1
        found = fake_quantize(matrix, grid)
        assert not found[1].any() and not found[2, 8:16].any() and found.isfinite().all()


@pytest.mark.parametrize(
    ("rows", "columns", "size", "groups"),
    [(64, 200, 128, 2), (3, 7, 3, 3), (2, 6, 3, 2), (4, 5, 9, 1), (4, 5, None, 1), (3, 4, 1, 4)],
)
def test_groups_never_straddle_rows(rows: int, columns: int, size: int | None, groups: int) -> None:
    """64 x 200 in groups of 128: OmniQuant's code makes 100 of them, out of pieces of two rows."""
    matrix = weight(rows, columns)
    cut = grouped(matrix, size)
    assert cut.shape[:2] == (rows, groups)
    assert torch.equal(ungrouped(cut, columns), matrix)
    low, high = extremes(matrix, size)
    for i, piece in enumerate(pieces(matrix, size)):
        assert torch.equal(low[:, i], piece.amin(1).clamp(max=0))
        assert torch.equal(high[:, i], piece.amax(1).clamp(min=0))
    # Row by row, group by group, it is the same.
    whole = fake_quantize(matrix, minmax_grid(matrix, 3, size, False))
    parts = [fake_quantize(p, minmax_grid(p, 3, None, False)) for p in pieces(matrix, size)]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_a_clipped_range_clips() -> None:
    matrix = torch.tensor([[-4.0, -1, 0, 1, 2, 8]])
    grid = grid_from_range(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), 2, None, False)
    assert fake_quantize(matrix, grid).tolist() == [[-1, -1, 0, 1, 2, 2]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_those_of_lsq(symmetric: bool) -> None:
    """Weight: 1 inside, 0 if clamped. Scale: round(w/s) - w/s inside, else the end of the grid."""
    matrix = (weight(4, 12) * 2).requires_grad_()
    scale = torch.full((4, 2), 0.5, requires_grad=True)
    zero = None if symmetric else torch.full((4, 2), 3.0)
    middle = 4.0 if symmetric else 3.0
    fake_quantize(matrix, Grid(scale, zero, bits=3, group_size=7)).sum().backward()
    steps = matrix.detach() / 0.5
    raw = steps.round() + middle
    inside = (raw >= 0) & (raw <= 7)
    assert inside.any() and not inside.all()
    assert torch.equal(matrix.grad, inside.float())
    each = torch.where(inside, steps.round() - steps, raw.clamp(0, 7) - middle)
    wanted = torch.stack([each[:, :7].sum(1), each[:, 7:].sum(1)], 1)
    torch.testing.assert_close(scale.grad, wanted, atol=1e-4, rtol=1e-5)


def test_the_range_is_differentiable_but_the_zero_point_is_not() -> None:
    low, high = (torch.tensor([[v]], requires_grad=True) for v in (-1.0, 2.0))
    grid = grid_from_range(low, high, 2, None, False)
    assert grid.zero is not None and not grid.zero.requires_grad
    grid.scale.sum().backward()
    assert low.grad.item() == pytest.approx(-1 / 3) and high.grad.item() == pytest.approx(1 / 3)


def test_gradients_of_a_zero_group_are_finite() -> None:
    matrix = torch.zeros(2, 4, requires_grad=True)
    for symmetric in (False, True):
        fake_quantize(matrix, minmax_grid(matrix, 4, None, symmetric)).sum().backward()
        assert matrix.grad.isfinite().all()
