"""Where GPTQ falls back, and what its ranges are searched by."""

import torch
import zoo

from lowbit.blocks.hessian import input_hessians
from lowbit.methods import GPTQ, RTN
from lowbit.methods.result import too_few_tokens
from lowbit.solvers.clipping import clipped_grid


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


def test_the_search_for_ranges_is_weighted_by_the_mean_square_of_each_input() -> None:
    task = zoo.task("llama")
    method = GPTQ(bits=3, group_size=16, min_tokens=8, match="self")
    result = method.quantize(task)
    hessians = input_hessians(task.block, task.groups, task.streams["quantized"])
    unweighted = 0
    for group in task.groups:
        diagonal = hessians[group.name].matrix.diagonal()
        for name in group.linears:
            weight = task.block.get_parameter(f"{name}.weight")
            scale = result.linears[name].scale
            wanted = clipped_grid(weight, diagonal, method.grid_shape).scale.to(scale.dtype)
            assert torch.equal(scale, wanted), name
            other = clipped_grid(weight, torch.ones_like(diagonal), method.grid_shape).scale
            unweighted += int((scale == other.to(scale.dtype)).all())
    assert not unweighted
