"""Damping grows as calibration tokens get fewer, for every method that rounds by a Hessian."""

import pytest
import torch
import zoo
from torch import Tensor, nn

from lowbit.blocks import BlockTask, LinearGroup, Stream
from lowbit.blocks.arguments import BlockArguments
from lowbit.methods import (
    GPTQ,
    METHODS,
    PTQ161,
    MatQuant,
    Method,
    MixedQuant,
    OmniQuant,
    QuIP,
    Trellis,
)
from lowbit.methods.damping import LEAST, damping_share

WIDTH = 96
FEW = 12  # tokens; the Hessian has rank 12 of 96
HESSIAN: dict[str, Method] = {
    "gptq": GPTQ(bits=3, min_tokens=1),
    "omniquant": OmniQuant(bits=3, min_tokens=1, epochs=0, rounding="gptq", init="awq"),
    "matquant": MatQuant(min_tokens=1, epochs=0, lwc=False, rounding="joint"),
    "quip": QuIP(codebook="HI", min_tokens=1),
    "trellis": Trellis(state_bits=9, min_tokens=1),
    "mixedquant": MixedQuant(
        bits=3, activation_bits=16, salient_ratio=0.0, rounding="gptq", min_tokens=1
    ),
    "ptq161": PTQ161(epochs=0, refit_salient=True, init="als", min_tokens=1),
}


@pytest.mark.parametrize(
    ("damping", "tokens", "width", "share"),
    [
        ("auto", 64, 128, 2.0),
        ("auto", 64, 64, 1.0),
        ("auto", 6400, 128, 0.02),
        ("auto", 128 * 2048, 1024, LEAST),
        ("auto", 0, 8, 8.0),
        (0.01, 64, 128, 0.01),
        (3.0, 10**6, 128, 3.0),
    ],
)
def test_the_share(damping: float, tokens: int, width: int, share: float) -> None:
    assert damping_share(damping, tokens, width) == share


def test_every_method_with_the_field_is_tried() -> None:
    assert {n for n, m in METHODS.items() if "damping" in m.model_fields} == HESSIAN.keys()
    assert all(METHODS[name]().damping == "auto" for name in HESSIAN)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def inputs(rows: int, seed: int) -> Tensor:
    """Correlated inputs: without feedback, or with a good Hessian, errors can be moved."""
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    draw = torch.randn(1, rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return draw @ (mix + 0.5 * torch.eye(WIDTH))


def error_on_other_inputs(method: Method, tokens: int) -> float:
    block = zoo.randomise(Block())
    stream = Stream([inputs(tokens, 1)], BlockArguments.of_one_block([{}]))
    task = BlockTask(
        name="block",
        block=block,
        groups=(LinearGroup("in", ("linear",)),),
        folds=(),
        streams=dict.fromkeys((*method.streams(), "float", "quantized"), stream),
        seed=0,
        log=zoo.log(),
    )
    result = method.quantize(task)
    assert result.report.linears["linear"].fallback is None
    other = inputs(4096, 2)
    lost = other @ (block.linear.weight - result.linears["linear"].dequantize()).T
    return float(lost.square().mean())


@pytest.mark.parametrize("name", HESSIAN)
def test_few_tokens_do_less_harm(name: str) -> None:
    """Measured on inputs that were not used for calibration."""
    fixed = HESSIAN[name].model_copy(update={"damping": LEAST})
    few = error_on_other_inputs(HESSIAN[name], FEW)
    assert few < 0.9 * error_on_other_inputs(fixed, FEW)
