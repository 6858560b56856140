"""Methods that match the float model's output: the order of work, and what it gains."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import zoo

from lowbit.blocks import BlockTask
from lowbit.blocks.capture import call_block
from lowbit.methods import GPTQ, PTQ161, MatQuant, Method, MixedQuant, OmniQuant, QuIP
from lowbit.methods.matching import steps
from lowbit.methods.result import BlockResult

FEW = {"min_tokens": 8}
MIXED = {"group_size": 16, "alignment": 4, "rounding": "gptq", **FEW}
METHODS: dict[str, Callable[[str], Method]] = {
    "gptq": lambda match: GPTQ(bits=2, match=match, **FEW),
    "gptq, groups": lambda match: GPTQ(bits=3, group_size=16, match=match, **FEW),
    "quip": lambda match: QuIP(match=match, tune_iters=0, **FEW),
    "quip, merged": lambda match: QuIP(match=match, tune_iters=0, merge_suv=True, **FEW),
    "omniquant": lambda match: OmniQuant(bits=2, match=match, epochs=1, **FEW),
    "omniquant, let": lambda match: OmniQuant(bits=3, let=True, match=match, epochs=1, **FEW),
    "omniquant, activations": lambda match: OmniQuant(
        bits=4, activation_bits=4, match=match, epochs=1, **FEW
    ),
    "mixedquant": lambda match: MixedQuant(**MIXED, bits=3, match=match),
    "mixedquant, smoothed": lambda match: MixedQuant(**MIXED, bits=3, smooth=0.5, match=match),
    "mixedquant, float inputs": lambda match: MixedQuant(
        **MIXED, bits=3, activation_bits=16, match=match
    ),
    "ptq161": lambda match: PTQ161(epochs=0, match=match, **FEW),
    "ptq161, refit": lambda match: PTQ161(epochs=0, refit_salient=True, match=match, **FEW),
    "matquant": lambda match: MatQuant(epochs=0, match=match, **FEW),
    "matquant, float inputs": lambda match: MatQuant(
        epochs=0, inputs="shared_float", match=match, **FEW
    ),
}


def output_error(task: BlockTask, result: BlockResult) -> float:
    """The error of the quantized block's output, as a share of the float model's."""
    block = deepcopy(task.block)
    result.install(block)
    with torch.no_grad():
        wanted = torch.cat([call_block(task.block, batch) for batch in task.streams["float"]])
        found = torch.cat([call_block(block, batch) for batch in task.streams["quantized"]])
    return float((found - wanted).square().sum() / wanted.square().sum())


# `make test` takes a sample of the families, `make test-exhaustive` runs all.
FAMILIES = {"llama": METHODS, "opt": ("quip, merged", "ptq161"), "mixtral": ("gptq", "mixedquant")}
CASES = [
    pytest.param(name, family, marks=() if name in sample else pytest.mark.exhaustive)
    for family, sample in FAMILIES.items()
    for name in METHODS
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_block_comes_closer_to_the_float_model(name: str, family: str) -> None:
    task = zoo.task(family, batches=8, noise=0.1)
    matched, plain = (METHODS[name](match).quantize(task) for match in ("float", "self"))
    assert output_error(task, matched) < output_error(task, plain)
    reports = matched.report.linears
    assert all(linear.correction is None for linear in plain.report.linears.values())
    rounded = [r for r in reports.values() if r.fallback is None]
    assert rounded and all(0 <= (r.correction or 0.0) <= 1 for r in rounded)
    assert any(r.correction for r in rounded)
    assert all(r.output_error is not None for r in rounded)


def test_a_group_is_measured_after_the_earlier_ones_are_quantized() -> None:
    task, linears = zoo.task("llama"), BlockResult().linears
    plain = GPTQ(bits=2, match="self", **FEW).quantize(task)
    drifts = []
    for step in steps(task, "float", "quantized", linears):
        assert step.moments is not None
        drifts.append(step.moments.mean((0, 1), torch.device("cpu"))[1].abs().max())
        linears |= {name: plain.linears[name] for name in step.group.linears}
    same = zoo.task("llama", noise=0.0)
    first, *later = (
        step.moments.mean((0, 1), torch.device("cpu"))[1].abs().max()
        for step in steps(same, "float", "quantized", plain.linears)
        if step.moments is not None
    )
    assert first == 0 and all(drift > 0 for drift in later)
    assert all(drift > 0 for drift in drifts)


def test_without_any_difference_every_bit_is_that_of_self() -> None:
    """With equal streams the first group has nothing to make up for."""
    task = zoo.task("llama", noise=0.0)
    matched, plain = (
        GPTQ(bits=3, match=match, **FEW).quantize(task) for match in ("float", "self")
    )
    for name in task.groups[0].linears:
        assert matched.report.linears[name].correction == 0
        assert torch.equal(matched.linears[name].packed, plain.linears[name].packed)
