"""Signs inside a block: its output stays as it is, bit for bit."""

import pytest
import torch
import zoo
from torch.func import functional_call

from lowbit.blocks import BlockTask
from lowbit.blocks.capture import call_block
from lowbit.blocks.folding import Tensors, tensors_of
from lowbit.methods.rotated.signs import Merged, merge_signs

QKV = [f"self_attn.{part}_proj" for part in "qkv"]
# What is left without signs to multiply at run time: on the input side, on the output side.
MERGED: dict[str, tuple[set[str], set[str]]] = {
    "opt": ({*QKV, "self_attn.out_proj", "fc1"}, {"self_attn.v_proj"}),
    "llama": (
        {*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
        {"self_attn.v_proj", "mlp.up_proj"},
    ),
    "mixtral": (
        {*QKV, "self_attn.o_proj", "mlp.gate"}
        | {f"mlp.experts.{i}.w{j}" for i in range(4) for j in (1, 2, 3)},
        {"self_attn.v_proj", *(f"mlp.experts.{i}.w3" for i in range(4))},
    ),
}


def draw(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).sign()


def merged(task: BlockTask) -> Merged:
    return merge_signs(tensors_of(task.block), task.folds, draw)


def outputs(task: BlockTask, tensors: Tensors) -> list[torch.Tensor]:
    found = []
    for batch in task.streams["float"]:
        out = functional_call(task.block, tensors, (batch.hidden,), dict(batch.kwargs))
        found.append(out[0] if isinstance(out, tuple) else out)
    return found


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_output_stays_as_it_is(name: str) -> None:
    task = zoo.task(name)
    found = merged(task)
    before = [call_block(task.block, batch) for batch in task.streams["float"]]
    assert all(map(torch.equal, outputs(task, found.tensors), before))
    unchanged = tensors_of(task.block)
    for reader, signs in found.columns.items():
        assert signs.abs().unique().tolist() == [1]
        magnitude = unchanged[f"{reader}.weight"].abs()
        assert torch.equal(found.tensors[f"{reader}.weight"].abs(), magnitude)


@pytest.mark.parametrize("name", MERGED)
def test_where_nothing_is_left_to_multiply(name: str) -> None:
    found = merged(zoo.task(name))
    assert (set(found.columns), found.rows) == MERGED[name]


def test_rows_of_a_fused_matrix_keep_their_signs() -> None:
    """Only its values could be merged: queries and keys have none to merge with."""
    found = merged(zoo.task("falcon 40b"))
    assert "self_attention.dense" in found.columns and not found.rows
