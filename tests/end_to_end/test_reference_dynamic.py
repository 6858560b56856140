"""The behaviour of the original code, with its faults, due to which it is for comparison only."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn

from lowbit.blocks import Batch
from lowbit.blocks.capture import call_block
from lowbit.methods import MixedQuant

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from reference_dynamic import (  # noqa: E402
    ReferenceDynamicLinear,
    fake_quantize_sorted,
    reference_dynamic,
)

pytestmark = pytest.mark.slow

SALIENT = torch.tensor([2, 17, 30])


def made(sort: str = "max", group_size: int | None = 8) -> tuple[nn.Linear, ReferenceDynamicLinear]:
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(40, 6)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return linear, ReferenceDynamicLinear(
        linear, SALIENT, sort=sort, bits=4, activation_bits=4, group_size=group_size
    )


def inputs() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(1, 9, 40, generator=draw) * torch.rand(40, generator=draw)


def test_rounding_by_hand() -> None:
    values = torch.tensor([[1.0, 10.0, 2.0, -20.0, 0.0], [-0.5, 7.0, 3.0, 5.0, 0.0]])
    # By the largest |value|: 4 | 0 | 2 | 1 | 3; groups (4, 0), (2, 1), (3).
    steps = torch.tensor([[1.0, 10, 10, 20, 1], [0.5, 7, 7, 5, 0.5]]) / 7
    wanted = torch.round(values / steps) * steps
    torch.testing.assert_close(fake_quantize_sorted(values, "max", 4, 2), wanted)


@pytest.mark.parametrize("sort", ["none", "max", "mean3std", "argmax"])
def test_salient_columns_are_exact_and_others_are_not(sort: str) -> None:
    linear, dynamic = made(sort)
    x = inputs()
    only = torch.zeros_like(x).index_copy(2, SALIENT, x[..., SALIENT])
    torch.testing.assert_close(dynamic(only), linear(only))
    error = (dynamic(x) - linear(x)).norm() / linear(x).norm()
    assert 0.01 < error < 0.3


def test_a_token_changes_what_earlier_ones_gave() -> None:
    dynamic, x = made()[1], inputs()
    other = x.clone()
    other[0, -1] = other[0, -1].flip(0) * 10
    assert not torch.equal(dynamic(x)[0, :-1], dynamic(other)[0, :-1])
    still = made("none")[1]
    assert torch.equal(still(x)[0, :-1], still(other)[0, :-1])


def test_salient_columns_widen_the_groups_of_weights() -> None:
    linear, _ = made()
    with torch.no_grad():
        linear.weight[:, SALIENT] *= 100
    dynamic = ReferenceDynamicLinear(
        linear, SALIENT, sort="none", bits=4, activation_bits=4, group_size=8
    )
    assert not dynamic.weight[:, 0].any()  # in one group with column 2


def test_it_cannot_be_saved() -> None:
    dynamic = made()[1]
    for module in (dynamic, nn.Sequential(deepcopy(dynamic))):
        with pytest.raises(ValueError, match="for comparison only: .* quantize with MixedQuant"):
            module.state_dict()


def test_sorting_by_weights_is_no_sorting_of_its_own() -> None:
    with pytest.raises(ValueError, match="sort is weight_max: .*allowed are none, max, mean3std"):
        made("weight_max")


def test_its_block_runs_sees_later_tokens_and_cannot_be_written() -> None:
    given = zoo.task("llama")
    method = MixedQuant(group_size=16, alignment=4, sort="max", clip=False)
    block = reference_dynamic(method, given)
    batch = given.streams["quantized"][0]
    wanted = call_block(given.block, batch)
    found = call_block(block, batch)
    assert 0.01 < zoo.error(found, wanted) < 0.5
    hidden = batch.hidden.clone()
    hidden[:, -3:] = 20 * hidden[:, -3:].flip(2)
    other = call_block(block, Batch(hidden, batch.kwargs))
    assert not torch.allclose(found[:, :-3], other[:, :-3], atol=1e-3)
    with pytest.raises(ValueError, match="for comparison only"):
        block.state_dict()
    assert isinstance(given.block.get_submodule("mlp.down_proj"), nn.Linear)
