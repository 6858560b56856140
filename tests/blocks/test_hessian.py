"""H = E[x x^T] against a direct computation; experts; accumulators on disk."""

from pathlib import Path

import pytest
import torch
import zoo

from lowbit.blocks import hessian
from lowbit.blocks.capture import call_block, observed
from lowbit.blocks.hessian import input_hessians


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_equals_the_mean_of_outer_products(
    name: str, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = zoo.task(name)
    if on_disk:
        monkeypatch.setattr(hessian, "MOST_IN_MEMORY", 0)
    found = input_hessians(task.block, task.groups, task.streams["float"], tmp_path)
    assert bool(list(tmp_path.glob("*.f64"))) == on_disk
    seen: dict[str, list[torch.Tensor]] = {group.name: [] for group in task.groups}
    first = {group.linears[0]: group.name for group in task.groups}
    with observed(task.block, first, lambda linear, x: seen[first[linear]].append(x)):
        for batch in task.streams["float"]:
            call_block(task.block, batch)
    for group, inputs in seen.items():
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double()
        assert found[group].tokens == len(rows)
        wanted = (rows.T @ rows / len(rows)).float()
        assert torch.allclose(found[group].matrix, wanted, rtol=1e-5, atol=1e-6)


def test_an_input_that_nobody_sees_is_zero() -> None:
    task = zoo.task("mixtral")
    with torch.no_grad():  # a tie: every token goes to the same two experts
        task.block.mlp.gate.weight.zero_()
    found = input_hessians(task.block, task.groups, task.streams["float"])
    experts = [found[f"mlp.experts.{expert}.input"] for expert in range(4)]
    idle = [hessian for hessian in experts if hessian.tokens == 0]
    assert len(idle) == 2 and not any(hessian.matrix.any() for hessian in idle)
