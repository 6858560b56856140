"""Vectors are rounded to their stored dtype, keep their sign, and take the gradient through it."""

import pytest
import torch

from lowbit.tuning.vectors import Vector

HALF = torch.tensor([1.0, -0.5, 0.0, 3e-5], dtype=torch.float16)


def test_nothing_changes_before_the_first_step() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for centred in (False, True):
            vector = Vector(HALF.to(dtype), centred)
            vector.refresh()
            assert torch.equal(vector.rounded(), HALF.to(dtype))
            assert torch.equal(vector.value.detach(), HALF.to(dtype).float())


def test_the_model_computes_with_what_is_stored() -> None:
    vector = Vector(HALF, centred=False)
    with torch.no_grad():
        vector.change.copy_(torch.tensor([1e-4, 1e-2, 0.5, -0.1]))
    vector.refresh()
    assert vector.rounded().dtype == torch.float16
    assert torch.equal(vector.value.detach(), vector.rounded().float())
    assert vector.rounded()[0] == 1  # less than half a step of float16
    assert vector.rounded()[1] == torch.tensor(-0.495, dtype=torch.float16)
    assert vector.rounded()[2] == 0  # a scale of 0 stays 0


@pytest.mark.parametrize(
    ("stored", "unit"),
    {
        "by its size": ([3.0, 0.0, -4.0], [25 / 3] * 1 + [25 / 3] + [16.0]),
        "of zeros": ([0.0, 0.0], [1.0, 1.0]),
    }.values(),
    ids=["by its size", "of zeros"],
)
def test_a_bias_leaves_zero(stored: list[float], unit: list[float]) -> None:
    vector = Vector(torch.tensor(stored), centred=True)
    with torch.no_grad():
        vector.change.fill_(1)
    moved = vector.rounded() - torch.tensor(stored)
    squares = torch.tensor(unit)
    wanted = torch.maximum(squares, torch.tensor(stored).square()).sqrt()
    assert torch.allclose(moved, wanted)


def test_the_gradient_passes_the_rounding() -> None:
    vector = Vector(HALF, centred=False)
    (vector.value * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    vector.take_gradient()
    assert vector.value.grad is None
    assert torch.allclose(vector.change.grad, torch.tensor([1.0, 1.0, 0.0, 4 * float(HALF[3])]))  # type: ignore[arg-type]
    vector.take_gradient()
    assert vector.change.grad is None  # as for an expert that got no token


def test_nothing_becomes_infinite() -> None:
    vector = Vector(torch.tensor([60000.0, -60000.0], dtype=torch.float16), centred=False)
    with torch.no_grad():
        vector.change.copy_(torch.tensor([1.0, -1.0]))
    assert vector.rounded().tolist() == [65504.0, -65504.0]
