import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from lowbit.blocks.parts import sum_of_parts


def shared(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {"product": a * b, "b": b, "constant": torch.tensor([1.0, 2.0]), "unused": a + 1}


def parts(given: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for power in (1, 2, 3):
        yield (given["product"] ** power * given["constant"]).sum() + given["b"].sum()


def test_value_and_gradient_are_those_of_the_sum() -> None:
    a, b = (torch.tensor([0.5, -1.5]) + i for i in (0, 1))
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    wanted = torch.stack(list(parts(shared(*leaves)))).sum()
    gradients = torch.autograd.grad(wanted, leaves)
    found = sum_of_parts(shared(*leaves), parts)
    assert float(found) == pytest.approx(float(wanted))
    found.backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_without_gradients_it_is_the_sum_alone() -> None:
    a = torch.tensor([0.5, -1.5], requires_grad=True)
    with torch.no_grad():
        found = sum_of_parts(shared(a, a), parts)
        assert not found.requires_grad
        assert float(found) == pytest.approx(float(sum(parts(shared(a, a)))))


def test_one_graph_at_a_time() -> None:
    a = torch.ones(2, requires_grad=True)
    alive: list[weakref.ref[Tensor]] = []

    def watched(given: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for _ in range(3):
            assert not any(graph() is not None for graph in alive)
            inner = given["product"].exp()
            alive.append(weakref.ref(inner))
            loss = inner.square().sum()
            del inner
            yield loss
            del loss

    sum_of_parts(shared(a, a), watched).backward()
    assert len(alive) == 3 and a.grad is not None


def test_a_gradient_that_is_not_finite_makes_the_loss_so() -> None:
    a = torch.zeros(2, requires_grad=True)
    found = sum_of_parts({"a": a * 1}, lambda given: iter([given["a"].sqrt().sum()]))
    assert not torch.isfinite(found)
