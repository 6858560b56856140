"""Output feedback: what it lowers, what it changes, and what is said where it cannot be had."""

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor

from lowbit.blocks import BlockTask
from lowbit.blocks.hessian import input_hessians
from lowbit.methods import GPTQ, RTN, Method, OmniQuant, QuIP, Trellis
from lowbit.methods.output_feedback import OUTPUT_NOT_POSITIVE_DEFINITE, WITHOUT
from lowbit.methods.result import BlockResult

pytestmark = pytest.mark.slow

METHODS: dict[str, Method] = {
    "gptq": GPTQ(bits=2, group_size=16, min_tokens=8, match="self"),
    "gptq, as it comes": GPTQ(bits=3, min_tokens=8, act_order=False, fine_zeros=True),
    "quip": QuIP(codebook="D4", min_tokens=8, tune_iters=0, match="self"),
    "quip, merged": QuIP(codebook="HI", min_tokens=8, tune_iters=0, merge_suv=True),
    "quip, rows": QuIP(min_tokens=8, row_scale="always"),
    "trellis": Trellis(rate=2, state_bits=9, min_tokens=8, match="self"),
}
every_method = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.kernels) if n == "trellis" else n for n in METHODS],
)


def correlated(rows: int) -> Tensor:
    """A few directions matter much more than the others."""
    draw = torch.Generator().manual_seed(rows)
    basis, _ = torch.linalg.qr(torch.randn(rows, rows, generator=draw))
    return (basis * torch.arange(1, rows + 1).float() ** -1.5) @ basis.T


def run(name: str, block: str, make: Callable[[int], Tensor], tokens: int = 1000) -> BlockResult:
    task = zoo.task(block)
    task.output_hessians = zoo.OutputHessians(task, make, tokens)
    return METHODS[name].model_copy(update={"output_feedback": True}).quantize(task)


def same(found: BlockResult, wanted: BlockResult) -> bool:
    return all(
        torch.equal(layer.dequantize(), wanted.linears[n].dequantize())
        for n, layer in found.linears.items()
    )


@every_method
def test_outputs_that_matter_alike_change_nothing(name: str) -> None:
    found, plain = run(name, "llama", torch.eye), METHODS[name].quantize(zoo.task("llama"))
    assert same(found, plain) and not zoo.fallbacks(found)


def without_signs(name: str, task: BlockTask, linear: str, values: Tensor) -> Tensor:
    """The error of a rounded weight, without signs that were merged into it."""
    weight, method = task.block.get_parameter(f"{linear}.weight"), METHODS[name]
    if not isinstance(method, QuIP) or not method.merge_suv:
        return weight - values
    merged = method._merged(task)
    error = merged.tensors[f"{linear}.weight"] - values
    return merged.row_signs(linear, weight)[:, None] * error * merged.columns.get(linear, 1)


@every_method
def test_the_weighted_error_falls(name: str) -> None:
    task, losses = zoo.task("llama"), dict[str, list[float]]()
    hessians = input_hessians(task.block, task.groups, task.streams["quantized"])
    for result in (run(name, "llama", correlated), METHODS[name].quantize(zoo.task("llama"))):
        for group in task.groups:
            hessian = hessians[group.name].matrix
            for linear in group.linears:
                error = without_signs(name, task, linear, result.linears[linear].dequantize())
                loss = float((correlated(len(error)) @ error @ hessian * error).sum())
                losses.setdefault(linear, []).append(loss)
    assert sum(both for both, _ in losses.values()) < 0.9 * sum(x for _, x in losses.values())


UNUSABLE: dict[str, tuple[Callable[[int], Tensor], int, str]] = {
    "too few tokens": (torch.eye, 3, f"too few gradients reached its output (3 tokens): {WITHOUT}"),
    "zeros": (lambda n: torch.zeros(n, n), 99, f"no gradient reached its output: {WITHOUT}"),
    "not finite": (lambda n: torch.full((n, n), torch.inf), 99, OUTPUT_NOT_POSITIVE_DEFINITE),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("name", ["gptq", "quip"])
def test_where_it_cannot_be_had_that_is_said(name: str, kind: str) -> None:
    make, tokens, sentence = UNUSABLE[kind]
    found = run(name, "mixtral", make, tokens)
    assert same(found, METHODS[name].quantize(zoo.task("mixtral")))
    named = zoo.fallbacks(found)
    assert named.keys() == found.linears.keys() and set(named.values()) == {sentence}


def test_an_expert_without_tokens_says_both() -> None:
    task = zoo.task("mixtral")
    with torch.no_grad():
        task.block.mlp.gate.weight.zero_()
    task.output_hessians = zoo.OutputHessians(task, torch.eye, 0)
    result = QuIP(codebook="HI", min_tokens=8, output_feedback=True).quantize(task)
    both = [text for text in zoo.fallbacks(result).values() if "calibration tokens" in text]
    assert len(both) == 6 and all(text.endswith(WITHOUT) for text in both)


@pytest.mark.parametrize("method", [RTN, OmniQuant])
def test_methods_without_it_refuse_it_by_name(method: type[Method]) -> None:
    with pytest.raises(ValueError, match="'output_feedback' is not a field of"):
        method(output_feedback=True)
