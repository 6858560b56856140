"""Moments of a linear's input in the float and in the quantized model, token by token."""

from copy import deepcopy

import pytest
import torch
import zoo
from torch import Tensor, nn

from lowbit.blocks import BlockTask
from lowbit.blocks.capture import observe_inputs
from lowbit.blocks.moments import hessians, paired_moments, stages

CPU = torch.device("cpu")


def inputs(block: nn.Module, name: str, task: BlockTask, stream: str) -> Tensor:
    found: list[Tensor] = []

    def keep(_: str, x: Tensor) -> None:
        found.append(x.reshape(-1, x.shape[-1]).clone())

    observe_inputs(block, [name], task.streams[stream], keep)
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ["q_proj", "o_proj", "gate_proj", "down_proj"]),
        ("opt", ["q_proj", "out_proj", "fc1", "fc2"]),
        ("mixtral", ["q_proj", "o_proj", "w1", "w2"]),
    ],
)
def test_stages_are_in_the_order_of_the_forward_pass(name: str, expected: list[str]) -> None:
    task = zoo.task(name)
    groups = {group.name: group for group in task.groups}
    shuffled = tuple(sorted(task.groups, key=lambda group: group.name, reverse=True))
    found = stages(task.block, shuffled, task.streams["quantized"])
    parts = [{groups[g].linears[0].rpartition(".")[2] for g in stage} for stage in found]
    assert sorted(name for stage in found for name in stage) == sorted(groups)
    assert [part for part in parts if part & set(expected)] == [{name} for name in expected]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_moments_of_every_group(name: str) -> None:
    task, changed = zoo.task(name), zoo.task(name).block
    for group in task.groups:
        streams = task.streams["float"], task.streams["quantized"]
        made = paired_moments(task.block, changed, [group], *streams)[group.name]
        first = group.linears[0]
        x, found = (
            inputs(task.block, first, task, "float"),
            inputs(changed, first, task, "quantized"),
        )
        hessian, drift = made.mean((0, 1), CPU)
        assert made.tokens == hessian.tokens == len(x)
        torch.testing.assert_close(hessian.matrix, found.T @ found / len(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(drift, (x - found).T @ found / len(x), rtol=1e-3, atol=1e-6)
        together = hessians({group.name: made}, CPU)[group.name]
        torch.testing.assert_close(together.matrix, hessian.matrix)
        for linear in group.linears:
            weight = task.block.get_parameter(f"{linear}.weight")
            energy = float((x @ weight.T).square().sum())
            assert made.energies[linear] == pytest.approx(energy, rel=1e-4)
            lost = float(((x - found) @ weight.T).square().sum())
            assert made.drifts[linear] == pytest.approx(lost, rel=1e-3)


def test_halves_are_the_even_and_the_odd_windows() -> None:
    task = zoo.task("llama")
    group = task.groups[0]
    streams = task.streams["float"], task.streams["quantized"]
    made = paired_moments(task.block, deepcopy(task.block), [group], *streams)[group.name]
    sizes = [batch.hidden.shape[:2].numel() for batch in task.streams["quantized"]]
    assert [half.second.tokens for half in made.halves] == [sum(sizes[0::2]), sum(sizes[1::2])]


def test_tokens_of_an_expert_are_paired_with_themselves() -> None:
    """A router of the quantized model that sends tokens elsewhere: only what both see is paired."""
    task = zoo.task("mixtral")
    changed = deepcopy(task.block)
    with torch.no_grad():
        router = changed.mlp.gate.weight
        router += 0.5 * router.std() * torch.randn(router.shape, generator=task.generator("r"))
    stage = [g for g in task.groups if g.linears[0].endswith(("w1", "w3"))]
    same = task.streams["float"]
    moved = 0
    for group in stage:
        first = group.linears[0]
        made = paired_moments(task.block, changed, stage, same, same)[group.name]
        found = inputs(changed, first, task, "float")
        hessian, drift = made.mean((0, 1), CPU)
        assert made.tokens == len(found)
        # The inputs of a token are equal in both blocks, so nothing drifts, whoever gets it.
        assert float(drift.abs().max()) < 1e-6 * max(float(hessian.matrix.abs().max()), 1e-3)
        moved += len(found) != len(inputs(task.block, first, task, "float"))
    assert moved
