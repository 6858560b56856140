from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.kernels.slicing import slice_codes, step
from lowbit.methods.matquant.packing import Slices, pack_nested
from lowbit.methods.matquant.slices import fake_slice, joint_codes, master_codes
from lowbit.solvers.clipping import LearnedClipping
from lowbit.solvers.gptq import OrderedFactor, gptq_codes, ordered_factor
from lowbit.solvers.rounding import Grid, GridShape, grid_from_range, minmax_grid

SIZE = 16
WIDTHS = [8, 6, 4, 3, 2]
WEIGHTS = {8: 0.1, 4: 0.1, 2: 1.0}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(values: Tensor, columns: int) -> Tensor:
    """(out, groups) to (out, in)."""
    return values.repeat_interleave(SIZE, 1)[:, :columns]


def grid_of(weight: Tensor, symmetric: bool, clip: float = 0.9) -> Grid:
    whole = minmax_grid(weight, 8, SIZE, symmetric)
    return replace(whole, scale=whole.scale * clip)


@pytest.mark.parametrize("extra_precision", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_what_runs_in_training_is_the_slice(
    bits: int, symmetric: bool, extra_precision: bool
) -> None:
    weight = random(6, 40)
    grid = grid_of(weight, symmetric)
    codes = master_codes(weight, grid)
    assert codes.dtype == torch.int16 and (codes.min() == -1 or codes.max() == 256)
    plain = codes.flatten(1)[:, :40].clamp(0, 255).to(torch.uint8)
    sliced = slice_codes(plain, bits, extra_precision).float() * step(bits)
    zero = torch.full_like(grid.scale, 128.0) if grid.zero is None else grid.zero
    wanted = spread(grid.scale, 40) * (sliced - spread(zero, 40))
    assert torch.equal(fake_slice(weight, grid, codes, bits, extra_precision), wanted)


def test_the_widths_differ() -> None:
    weight = random(4, 32)
    grid = grid_of(weight, False)
    codes = master_codes(weight, grid)
    found = [fake_slice(weight, grid, codes, bits, False) for bits in range(2, 9)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    errors = [float((values - weight).square().mean()) for values in found]
    assert errors == sorted(errors, reverse=True)


def surrogate(
    weight: Tensor, grid: Grid, bits: int, extra_precision: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """(weight, scale) -> what the straight-through gradient is the true gradient of, from here.

    Where nothing is clamped, rounding and slicing together add a constant to the code; where
    something is, the code is a constant.
    """
    columns = weight.shape[1]
    zero = torch.full_like(grid.scale, 128.0) if grid.zero is None else grid.zero
    zero, scale = spread(zero, columns).double(), spread(grid.scale, columns).double()
    rounded = torch.round(weight.double() / scale) + zero
    codes = rounded.clamp(0, 255)
    whole = torch.floor(codes / step(bits) + 0.5)
    kept = whole if extra_precision or bits == 8 else whole.clamp(max=2**bits - 1)
    free = (codes == rounded) & (kept == whole)
    constant = kept * step(bits) - weight.double() / scale

    def function(moved: Tensor, scale: Tensor, moved_zero: Tensor) -> Tensor:
        """A free code moves with the zero point, so that its value stays."""
        scale, moved_zero = spread(scale, columns), spread(moved_zero, columns)
        clamped = scale * (kept * step(bits) - moved_zero)
        return torch.where(free, scale * (moved / scale + constant - zero), clamped)

    return function


@pytest.mark.parametrize("extra_precision", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradients_are_those_of_the_surrogate(
    bits: int, symmetric: bool, extra_precision: bool
) -> None:
    weight, toward = random(3, 24), random(3, 24, seed=1).double()
    grid = grid_of(weight, symmetric, clip=0.7)
    leaf, scale = weight.clone().requires_grad_(), grid.scale.clone().requires_grad_()
    zero = torch.full_like(scale, 128.0) if grid.zero is None else grid.zero.clone()
    zero.requires_grad_(not symmetric)
    codes, moved = master_codes(weight, grid), replace(grid, scale=scale)
    if not symmetric:
        moved = replace(moved, zero=zero)
    sliced = fake_slice(leaf, moved, codes, bits, extra_precision)
    (sliced * toward.float()).sum().backward()
    function = surrogate(weight, grid, bits, extra_precision)

    def loss(weight: Tensor, scale: Tensor, zero: Tensor) -> float:
        return float((function(weight, scale, zero) * toward).sum())

    size = 1e-6
    every = (leaf, scale) if symmetric else (leaf, scale, zero)
    for index, parameter in enumerate(every):
        found = parameter.grad
        assert found is not None
        for place in range(parameter.numel()):
            moves = []
            for sign in (1, -1):
                at = [each.detach().double() for each in (leaf, scale, zero)]
                at[index].view(-1)[place] += sign * size
                moves.append(loss(*at))
            by_difference = (moves[0] - moves[1]) / (2 * size)
            assert float(found.view(-1)[place]) == pytest.approx(by_difference, rel=1e-3, abs=1e-4)
    passes = leaf.grad != 0
    assert passes.any() and not passes.all()  # some are clamped


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_clips_learn_from_the_loss_of_every_width(bits: int) -> None:
    """A slice that is rounded without a straight-through gradient teaches next to nothing."""
    weight = random(8, 32)
    clipping = LearnedClipping.start(weight, SIZE)
    leaf = weight.clone().requires_grad_()
    grid = clipping.grid(leaf, GridShape(8, SIZE, False))
    sliced = fake_slice(leaf, grid, master_codes(weight, grid), bits, False)
    (sliced * random(8, 32, seed=2)).sum().backward()
    for gradient in (leaf.grad, clipping.low.grad, clipping.high.grad):
        assert gradient is not None and gradient.isfinite().all()
        assert float((gradient != 0).float().mean()) > 0.5
    assert leaf.grad is not None and leaf.grad.norm() > 0.6 * random(8, 32, seed=2).norm()


def test_a_ragged_last_group_has_its_own_gradient() -> None:
    weight = random(2, 20)
    leaf = weight.clone().requires_grad_()
    grid = minmax_grid(weight, 8, SIZE, False)
    fake_slice(leaf, grid, master_codes(weight, grid), 4, True)[:, -1].sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad[:, -1] == 1).all() and not leaf.grad[:, :-1].any()


# Joint rounding.


def problem(rows: int = 12, columns: int = 64) -> tuple[Tensor, Grid, OrderedFactor]:
    mixing = random(columns, columns, seed=3) * torch.linspace(0.2, 2, columns)
    inputs = random(400, columns, seed=4) @ mixing
    hessian = ordered_factor(inputs.T @ inputs / 400, 0.01, True)
    assert hessian is not None
    weight = random(rows, columns, seed=5)
    return (
        weight,
        grid_from_range(weight.amin(1, True), weight.amax(1, True), 8, None, False),
        hessian,
    )


def losses(codes: Tensor, weight: Tensor, grid: Grid, hessian: OrderedFactor) -> dict[int, float]:
    """tr(E H E^T) at every width."""
    found = {}
    for bits in WIDTHS:
        assert grid.zero is not None
        values = grid.scale * (slice_codes(codes, bits).float() * step(bits) - grid.zero)
        error = (weight - values)[:, hessian.order]
        found[bits] = float(((error @ hessian.damped) * error).sum())
    return found


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    return master_codes(weight, grid).clamp(0, 255).to(torch.uint8).flatten(1)


def weighted(loss: dict[int, float], weights: dict[int, float]) -> float:
    return sum(weight * loss[bits] for bits, weight in weights.items())


@pytest.mark.parametrize("weights", [WEIGHTS, {2: 1.0}, {8: 1.0, 4: 1.0, 2: 1.0}, {4: 1.0, 3: 1.0}])
def test_joint_rounding_is_better_by_what_it_minimises(weights: dict[int, float]) -> None:
    weight, grid, hessian = problem()
    plain = losses(nearest(weight, grid), weight, grid, hessian)
    joint = losses(joint_codes(weight, grid, hessian, weights, False), weight, grid, hessian)
    assert weighted(joint, weights) < 0.75 * weighted(plain, weights)
    gptq = losses(gptq_codes(weight, grid, hessian)[0], weight, grid, hessian)
    assert weighted(joint, weights) < 0.75 * weighted(gptq, weights)  # which knows of 8 bits only


def test_at_8_bits_alone_it_is_gptq() -> None:
    weight, grid, hessian = problem()
    joint = joint_codes(weight, grid, hessian, {8: 1.0}, False)
    assert torch.equal(joint, gptq_codes(weight, grid, hessian)[0])


def test_a_heavier_weight_makes_a_width_better() -> None:
    weight, grid, hessian = problem()
    light, heavy = (
        losses(joint_codes(weight, grid, hessian, {8: w, 2: 1.0}, False), weight, grid, hessian)
        for w in (0.1, 1000.0)
    )
    assert heavy[8] < light[8] and light[2] < heavy[2]


def test_with_independent_inputs_nearest_codes_are_best_already() -> None:
    """Half-up slices of the nearest code are themselves nearest, to half a code."""
    weight, grid, _ = problem()
    independent = ordered_factor(torch.eye(64), 0.01, False)
    assert independent is not None
    codes = joint_codes(weight, grid, independent, WEIGHTS, False)
    assert (codes.int() - nearest(weight, grid).int()).abs().max() <= 1


def test_joint_rounding_with_groups_symmetric_and_one_level_more() -> None:
    weight, _, hessian = problem()
    grid = minmax_grid(weight, 8, SIZE, True)
    codes = joint_codes(weight, grid, hessian, {2: 1.0}, True)
    scale = spread(grid.scale, 64)

    def loss(codes: Tensor) -> float:
        values = scale * (slice_codes(codes, 2, True).float() * 64 - 128)
        error = (weight - values)[:, hessian.order]
        return float(((error @ hessian.damped) * error).sum())

    assert loss(codes) < 0.75 * loss(nearest(weight, grid))
    assert int(slice_codes(codes, 2, True).max()) == 4


def test_with_groups_each_column_is_rounded_to_the_grid_of_its_own_group() -> None:
    """At 8 bits alone, which is GPTQ; the groups have very different scales."""
    weight, _, hessian = problem()
    weight = weight * 10 ** torch.arange(4.0).repeat_interleave(SIZE)
    grid = minmax_grid(weight, 8, SIZE, False)
    joint = joint_codes(weight, grid, hessian, {8: 1.0}, False)
    assert torch.equal(joint, gptq_codes(weight, grid, hessian)[0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_width_is_rounded_to_the_grid_of_its_own(symmetric: bool) -> None:
    """With independent inputs a code is the best of 256, by the values of its slices."""
    weight = random(5, 32)
    independent = ordered_factor(torch.eye(32), 0.01, False)
    assert independent is not None
    grid = grid_of(weight, symmetric)
    zero = None if grid.zero is None else (grid.zero + 20).clamp(0, 255)
    grids = {8: grid, 2: replace(grid, scale=0.6 * grid.scale, zero=zero)}
    codes = joint_codes(weight, grid, independent, {8: 1.0, 2: 1.0}, False, own={2: grids[2]})
    every, lost = torch.arange(256, dtype=torch.uint8), torch.zeros(5, 32, 256)
    for bits, each in grids.items():
        points = torch.full_like(each.scale, 128.0) if each.zero is None else each.zero
        levels = slice_codes(every, bits, False).float() * step(bits)
        values = spread(each.scale, 32)[..., None] * (levels - spread(points, 32)[..., None])
        lost += (values - weight[..., None]).square()
    assert torch.allclose(lost.gather(2, codes.long()[..., None])[..., 0], lost.amin(2), rtol=1e-3)


def test_a_packed_slice_with_a_grid_of_its_own_has_less_error() -> None:
    weight, grid, hessian = problem()
    wide = {8: 1.0, 2: 1.0}
    plain = pack_nested(weight, None, grid, hessian, Slices(wide, False), True)
    own = pack_nested(weight, None, grid, hessian, Slices(wide, False, (3, 2)), True)
    assert own.spec.own_grids == [3, 2]
    lost = {}
    for bits in WIDTHS:
        errors = [
            (weight - layer.at(bits).dequantize())[:, hessian.order] for layer in (plain, own)
        ]
        lost[bits] = [float(((e @ hessian.damped) * e).sum()) for e in errors]
    assert lost[2][1] < 0.95 * lost[2][0] and lost[3][1] < 0.95 * lost[3][0]
    assert lost[8][1] < 1.1 * lost[8][0]
