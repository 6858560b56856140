"""Corrected targets: the least-squares optimum, and a strength that other windows confirm."""

import torch
from torch import Tensor

from lowbit.blocks.hessian import OuterSum
from lowbit.blocks.moments import Half, PairedMoments
from lowbit.solvers.correction import corrected, output_error

ROWS, COLUMNS, TOKENS = 12, 16, 4000


def moments_of(x: Tensor, found: Tensor, weight: Tensor | None = None) -> PairedMoments:
    """The moments of inputs x of the float model, and of those that the quantized model found."""
    halves = []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        sums = [OuterSum(torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)) for _ in range(2)]
        sums[0].update(found[part])
        sums[1].update(x[part] - found[part], found[part])
        for each in sums:
            each.flush()
        halves.append(Half(*sums))
    made = PairedMoments((halves[0], halves[1]))
    if weight is not None:
        energies = [float((rows @ weight.T).square().sum()) for rows in (x, x - found)]
        made.add(0, {"linear": energies}, None, None, None)
    return made


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=draw)
    return (
        torch.randn(ROWS, COLUMNS, generator=draw),
        torch.randn(TOKENS, COLUMNS, generator=draw) @ mixed,
    )


def test_the_whole_step_reaches_the_least_squares_optimum() -> None:
    weight, x = drawn()
    found = x @ torch.linspace(0.7, 1.3, COLUMNS).diag()  # nothing is lost: the strength is 1
    target = corrected(weight, moments_of(x, found), damping=1e-9)
    best = torch.linalg.lstsq(found.double(), (x @ weight.T).double()).solution.T
    assert target.strength > 0.999
    assert (target.weight - best).norm() < 1e-3 * best.norm()


def test_equal_inputs_leave_every_bit() -> None:
    weight, x = drawn()
    target = corrected(weight, moments_of(x, x), damping=0.01)
    assert target.strength == 0
    assert torch.equal(target.weight, weight)


def test_a_step_that_the_other_half_does_not_confirm_is_not_taken() -> None:
    """Differences without a rule: a step of the same size on the same windows would fit noise."""
    weight, x = drawn()
    draw = torch.Generator().manual_seed(1)
    few = slice(0, 3 * COLUMNS)
    found = x[few] + x[few].std() * torch.randn(x[few].shape, generator=draw)
    rule = corrected(weight, moments_of(x, x @ torch.linspace(0.7, 1.3, COLUMNS).diag()), 0.01)
    noise = corrected(weight, moments_of(x[few], found), damping=0.01)
    assert noise.strength < 0.9 < rule.strength


def test_the_target_lowers_the_error_on_windows_that_nobody_saw() -> None:
    weight, x = drawn()
    draw = torch.Generator().manual_seed(2)
    change = torch.eye(COLUMNS) + 0.2 * torch.randn(COLUMNS, COLUMNS, generator=draw)
    noise = 0.3 * x.std() * torch.randn(x.shape, generator=draw)
    found = x @ change + noise
    seen, unseen = slice(0, TOKENS // 2), slice(TOKENS // 2, None)
    target = corrected(weight, moments_of(x[seen], found[seen]), damping=0.01)
    wanted = x[unseen] @ weight.T

    def error(made: Tensor) -> float:
        return float((wanted - found[unseen] @ made.T).square().sum())

    assert error(target.weight) < 0.8 * error(weight)


def test_one_half_alone_confirms_nothing() -> None:
    weight, x = drawn()
    made = moments_of(x[:1], 0.5 * x[:1])
    assert corrected(weight, made, damping=0.01).strength == 0


def test_output_error_is_that_of_the_outputs() -> None:
    weight, x = drawn()
    draw = torch.Generator().manual_seed(3)
    found = x + 0.1 * torch.randn(x.shape, generator=draw)
    for noise in (0.0, 1e-3, 0.1):
        values = weight + noise * torch.randn(weight.shape, generator=draw)
        measured = output_error(weight, values, "linear", moments_of(x, found, weight))
        exact, made = (x @ weight.T).double(), (found @ values.T).double()
        expected = float((exact - made).square().sum() / exact.square().sum())
        assert abs(measured - expected) < 1e-3 * expected


def test_an_output_of_zero_has_no_relative_error() -> None:
    weight, x = torch.zeros(ROWS, COLUMNS), torch.randn(TOKENS, COLUMNS)
    assert output_error(weight, weight, "linear", moments_of(x, x, weight)) == 0
