"""Budgets: the kernels and the traffic of a training step, as benchmarks/steps.py counts them."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import steps

# Of a step: kernels without the optimizer's, traffic and what is saved in units of the weights.
# Of an evaluation: kernels and traffic of every batch.
BUDGETS = {
    "omniquant W4 g128": (480, 36.0, 0.8, 48, 0.1),
    "omniquant W4 g128, LET": (660, 53.0, 2.0, 48, 0.1),
    "omniquant W4A4, LET": (1260, 55.0, 2.2, 240, 0.1),
    "matquant 842": (1120, 100.0, 2.2, 142, 0.1),
    "ptq161": (395, 0.1, 0.1, 182, 0.1),
}
LOOPS = {"gptq": 15, "E8P12": 430, "D4": 32, "HI": 11}  # kernels for each block of columns


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_stays_within_its_budget(name: str) -> None:
    training = steps.training_of(steps.METHODS[name])
    one, (_, each) = steps.step_of(training), steps.evaluation_of(training)
    found = (one.kernels, one.traffic, one.saved, each.kernels, each.traffic)
    assert all(f <= most for f, most in zip(found, BUDGETS[name], strict=True)), found
    assert one.questions == 1


@pytest.mark.slow
def test_the_loops_of_solvers_stay_within_their_budgets() -> None:
    found = steps.rounding_loops()
    assert all(found[name] <= most for name, most in LOOPS.items()), found
