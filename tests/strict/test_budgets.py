"""What a GPU would have to wait for, in training and in a forward pass."""

from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo
from strict_device import Counts, counted

import lowbit
from lowbit.methods import PTQ161, MatQuant, Method, OmniQuant, QuIP

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

BLOCKS = 2
GRID: dict[str, Any] = {"group_size": 16, "min_tokens": 8, "init": "minmax"}
TRAINED: dict[str, tuple[Method, str]] = {
    "omniquant": (OmniQuant(bits=3, rounding="nearest", let=True, **GRID), "epochs"),
    "omniquant, 4-bit inputs": (
        OmniQuant(bits=4, activation_bits=4, rounding="nearest", let=True, **GRID),
        "epochs",
    ),
    "omniquant, learned codes": (
        OmniQuant(bits=3, rounding="learned", epochs=0, **GRID),
        "rounding_epochs",
    ),
    "matquant": (MatQuant(rounding="nearest", widths=[8, 4, 2], **GRID), "epochs"),
    "ptq161": (PTQ161(alignment=4, min_tokens=8), "epochs"),
    "quip": (QuIP(codebook="HI", min_tokens=8), "finetune_epochs"),
}


def counts_of(method: Method, out: Path) -> Counts:
    with counted() as counts:
        options = {"only": ("layers.1.*",), "self_check": False, "device": "strict"}
        quantized.quantize(quantized.source(), out, method, **options)
    return counts


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_waits_twice_at_most(name: str, tmp_path: Path) -> None:
    method, field = TRAINED[name]
    few, many = (
        counts_of(method.with_fields({field: epochs}), tmp_path / str(epochs)) for epochs in (1, 3)
    )
    steps = 2 * quantized.SAMPLES // method.windows_per_batch()  # 2 epochs of a block
    assert many.ops > few.ops + 10 * steps  # it was trained for longer
    assert many.items - few.items <= 2 * steps
    assert many.sizes == few.sizes and many.index_copies == 0


@pytest.mark.parametrize("method", ["rtn", "quip", "matquant"])
def test_a_forward_pass_waits_for_nothing(method: str) -> None:
    model = lowbit.load(quantized.folder(method=method), device_map="strict:0")[0]
    tokens = zoo.tokens().to("strict")
    with torch.no_grad(), counted() as counts:
        model(tokens)
    assert counts.items == counts.sizes == counts.index_copies == counts.down == 0


def test_experts_wait_once_for_each_block() -> None:
    model = lowbit.load(quantized.folder("mixtral"), device_map="strict:0")[0]
    tokens = zoo.tokens().to("strict")
    with torch.no_grad(), counted() as counts:
        model(tokens)
    assert counts.items == counts.index_copies == 0 and counts.sizes == BLOCKS
