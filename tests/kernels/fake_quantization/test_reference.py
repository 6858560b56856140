"""One autograd function for rounding: the values and gradients of the plain operations."""

import pytest
import torch
from torch import Tensor

from lowbit.kernels.fake_quantization import fake_quantize, reference
from lowbit.kernels.straight_through import round_ste

# rows, groups, size, bits, steps between zero points (None: a number for all)
CASES = {
    "a group for each row": (200, 1, 33, 3, 1.0),
    "groups": (130, 4, 16, 4, 1.0),
    "fine zero points": (191, 4, 16, 2, 0.25),
    "symmetric": (128, 2, 8, 4, None),
    "groups of one": (65, 5, 1, 8, 1.0),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def problem(case: tuple) -> tuple[Tensor, Tensor, Tensor | float, int]:
    """Weights of which some are clamped, scales, zero points and the largest code."""
    rows, groups, size, bits, step = case
    draw = torch.Generator().manual_seed(0)
    top = 2**bits - 1
    scale = torch.rand(rows, groups, 1, generator=draw) + 0.1
    if step is None:
        zero: Tensor | float = 2.0 ** (bits - 1)
    else:
        zero = (torch.rand(rows, groups, 1, generator=draw) * top / step).round() * step
    values = torch.randn(rows, groups, size, generator=draw) * scale * top
    return values, scale, zero, top


def by_operations(values: Tensor, scale: Tensor, zero: Tensor | float, top: int) -> Tensor:
    fraction = zero % 1
    codes = (round_ste(values / scale + fraction) + (zero - fraction)).clamp(0, top)
    return (codes - zero) * scale


def gradients(function, case: tuple) -> tuple[Tensor, ...]:
    values, scale, zero, top = problem(case)
    values.requires_grad_()
    scale.requires_grad_()
    out = function(values, scale, zero, top)
    # The gradient of a weight is laid out by columns, as the product of a linear gives it.
    by_columns = torch.randn(out[0].numel(), len(out), generator=torch.Generator().manual_seed(1))
    out.backward(by_columns.T.view(out.shape))
    assert values.grad is not None and scale.grad is not None
    return out.detach(), values.grad, scale.grad


@every_case
@pytest.mark.parametrize("tile", [1, 5000, 2**18])
def test_values_and_gradients_are_those_of_the_operations(
    case: tuple, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE", tile)

    def coarse(values: Tensor, scale: Tensor, zero: Tensor | float, top: int) -> Tensor:
        return fake_quantize(values, scale, zero, top, fine=False)

    functions = [fake_quantize] if case[-1] == 0.25 else [fake_quantize, coarse]
    wanted = gradients(by_operations, case)
    for function in functions:
        found = gradients(function, case)
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_that_nobody_needs_is_not_computed(which: int) -> None:
    values, scale, zero, top = problem(CASES["groups"])
    needed = (values, scale)[which].requires_grad_()
    fake_quantize(values, scale, zero, top).sum().backward()
    assert needed.grad is not None
    assert (values, scale)[1 - which].grad is None


def test_the_weight_and_its_grid_alone_are_saved() -> None:
    values, scale, zero, top = problem(CASES["groups"])
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, id):
        fake_quantize(values.requires_grad_(), scale, zero, top)
    groups = scale.numel()
    assert [len(values.flatten()), groups, groups, groups, groups] == saved


def test_zero_points_that_are_learned_have_gradients() -> None:
    values, scale, zero, top = problem(CASES["fine zero points"])
    assert isinstance(zero, Tensor)
    found = []
    for function in (fake_quantize, by_operations):
        leaf = zero.clone().requires_grad_()
        function(values, scale, leaf, top).square().sum().backward()
        found.append(leaf.grad)
    assert found[0] is not None and torch.equal(found[0], found[1]) and found[0].abs().sum() > 0
