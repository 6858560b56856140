"""Where GPTQ falls back."""

import torch
import zoo

from lowbit.methods import GPTQ, RTN
from lowbit.methods.result import too_few_tokens


def test_experts_with_too_few_tokens_are_rounded_to_nearest_and_named() -> None:
    task = zoo.task("mixtral")
    with torch.no_grad():
        task.block.mlp.gate.weight.zero_()
    result = GPTQ(bits=3, group_size=16, min_tokens=8).quantize(task)
    nearest = RTN(bits=3, group_size=16).quantize(task)
    named = zoo.fallbacks(result)
    assert len(named) == 6 and set(named.values()) == {too_few_tokens(0)}  # two experts
    for name in result.linears:
        same = torch.equal(result.linears[name].packed, nearest.linears[name].packed)
        assert same == (name in named), name
