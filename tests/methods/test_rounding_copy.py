"""The copy of a block rounds what it reads and shares its parameters; the block stays as it is."""

import pytest
import torch
import zoo
from torch import Tensor

from lowbit.blocks.attention import MARK
from lowbit.blocks.capture import call_block
from lowbit.formats.activation import Activation, AttentionRounding
from lowbit.formats.reading import Reading
from lowbit.methods.rounding_copy import rounding_copy

W4 = Reading(Activation(bits=4, symmetric=False))
HEADS = AttentionRounding(bits=4, symmetric=False)


def test_the_copy_rounds_and_the_block_stays() -> None:
    task = zoo.task("llama")
    batch = task.streams["float"][0]
    before = call_block(task.block, batch)
    copy = rounding_copy(task.block, {"mlp.down_proj": W4}, {"self_attn": HEADS})
    assert list(map(id, copy.parameters())) == list(map(id, task.block.parameters()))
    assert getattr(copy.self_attn, MARK) == HEADS.settings()
    assert not hasattr(task.block.self_attn, MARK)
    assert torch.equal(call_block(task.block, batch), before)
    read: dict[str, Tensor] = {}
    for name in ("mlp.down_proj", "mlp.up_proj"):
        copy.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: read.setdefault(name, args[0])
        )
    assert zoo.error(call_block(copy, batch), before) > 0.01
    levels = {name: len(x.flatten(0, -2)[0].unique()) for name, x in read.items()}
    assert levels["mlp.down_proj"] <= 16 < levels["mlp.up_proj"]


@pytest.mark.parametrize("part", ["linears", "attentions"])
def test_each_part_alone_rounds(part: str) -> None:
    task = zoo.task("llama")
    batch = task.streams["float"][0]
    linears = {"self_attn.q_proj": W4} if part == "linears" else {}
    attentions = {"self_attn": HEADS} if part == "attentions" else {}
    with torch.no_grad():
        found = call_block(rounding_copy(task.block, linears, attentions), batch)
    assert zoo.error(found, call_block(task.block, batch)) > 1e-3
