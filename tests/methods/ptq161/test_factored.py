"""The factored layer against the dense weight: the same outputs, the same gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowbit.methods.ptq161.binary import alternated, salient_mask
from lowbit.methods.ptq161.factored import FactoredLinear

OUT, IN = 7, 20


def layer(salient: int, bias: bool) -> FactoredLinear:
    draw = torch.Generator().manual_seed(salient)
    weight = torch.randn(OUT, IN, generator=draw)
    mask = salient_mask(torch.rand(IN, generator=draw), salient)
    binary = alternated(weight[:, ~mask], torch.ones(IN - salient), with_mean=True)
    made = FactoredLinear(binary, weight[:, mask], mask, torch.ones(OUT) if bias else None)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return made


def dense(factored: FactoredLinear) -> Tensor:
    """The weight, by the formula."""
    binary = factored.binary
    row = (binary.row * factored.row_log.exp())[:, None]
    column = binary.column * factored.column_log.exp()
    plain = column * (torch.where(binary.negative, -row, row) + binary.mean[:, None])
    weight = torch.empty(OUT, IN)
    weight[:, factored.salient_channels] = factored.salient
    return weight.index_copy(1, factored.plain_channels, plain)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("salient", [0, 6])
def test_outputs_and_gradients_are_those_of_the_dense_weight(salient: int, bias: bool) -> None:
    made = layer(salient, bias)
    learned = list(made.parameters())
    assert [p.numel() for p in learned] == [OUT, IN - salient]
    x = torch.randn(2, 5, IN, requires_grad=True)
    outputs = made(x), functional.linear(x, dense(made), made.bias)
    torch.testing.assert_close(*outputs)
    target = torch.randn(2, 5, OUT)
    found, wanted = (
        torch.autograd.grad((out - target).square().sum(), [x, *learned]) for out in outputs
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert all(gradient.abs().max() > 0.1 for gradient in wanted)


def test_nothing_as_large_as_the_weight_gets_a_gradient() -> None:
    made, sizes = layer(6, True), []
    x = torch.randn(3, IN, requires_grad=True)

    def note(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made(x)
    assert sizes and max(sizes) < OUT * IN // 2
