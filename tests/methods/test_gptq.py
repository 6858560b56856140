"""What GPTQ gives up on, and says so."""

import torch
import zoo

from lowbit.methods import GPTQ, RTN


def test_starved_experts_are_rounded_to_nearest_and_named() -> None:
    task = zoo.task("mixtral")
    with torch.no_grad():
        task.block.mlp.gate.weight.zero_()
    result = GPTQ(bits=3, group_size=16, min_tokens=8).quantize(task)
    nearest = RTN(bits=3, group_size=16).quantize(task)
    named = result.report["rounded_to_nearest"]
    assert len(named) == 6 and set(named.values()) == {0}  # w1, w2 and w3 of two experts
    for name in result.linears:
        same = torch.equal(result.linears[name].packed, nearest.linears[name].packed)
        assert same == (name in named), name
