"""What a method returns: how it is put into a block, what it says of linears that fell back."""

import math

import pytest
import torch
import zoo
from torch import nn

from lowbit.blocks.attention import MARK
from lowbit.events import Event
from lowbit.formats.activation import AttentionRounding
from lowbit.formats.uniform import UniformLayout, UniformLinear
from lowbit.methods.result import (
    NOT_POSITIVE_DEFINITE,
    BlockResult,
    signal_to_noise,
    too_few_tokens,
    warn_of_hessians,
)
from lowbit.run_report import LinearReport


def packed(codes: list[list[int]], scale: float) -> UniformLinear:
    return UniformLinear.from_codes(
        torch.tensor(codes, dtype=torch.uint8),
        torch.full((len(codes), 1), scale),
        None,
        UniformLayout(4, None),
    )


def test_signal_to_noise() -> None:
    linear = packed([[9, 8], [8, 6]], 0.5)  # 0.5, 0; 0, -1
    weight = linear.dequantize()
    assert signal_to_noise(weight, linear) == math.inf
    assert signal_to_noise(weight + 0.25, linear) == pytest.approx(
        10 * math.log10((0.75**2 + 0.25**2 * 2 + 0.75**2) / (4 * 0.25**2))
    )
    assert signal_to_noise(torch.zeros(2, 2), linear) == math.inf


def test_all_of_a_result_is_installed() -> None:
    block = zoo.task("llama").block
    linear = packed([[9, 8], [8, 6]], 0.5)
    norm = torch.arange(48.0)
    result = BlockResult(
        linears={"mlp.up_proj": linear},
        tensors={"input_layernorm.weight": norm},
        attention={"self_attn": AttentionRounding(bits=4, symmetric=True)},
    )
    result.install(block)
    assert block.mlp.up_proj is linear and isinstance(block.mlp.gate_proj, nn.Linear)
    assert torch.equal(block.input_layernorm.weight, norm)
    assert getattr(block.self_attn, MARK) == {"bits": 4, "symmetric": True}


def test_one_warning_for_all_hessians_and_none_for_few_tokens() -> None:
    task, events = zoo.task("llama"), list[Event]()
    task.log = zoo.log(events.append)
    sentences = {"a": NOT_POSITIVE_DEFINITE, "b": too_few_tokens(3), "c": None}
    sentences |= {"d": NOT_POSITIVE_DEFINITE}
    linears = {
        name: LinearReport(signal_to_noise_db=9.0, fallback=sentence)
        for name, sentence in sentences.items()
    }
    warn_of_hessians(task, {name: linears[name] for name in "bc"})
    assert events == []
    warn_of_hessians(task, linears)
    assert [event.text for event in events] == [f"a, d: {NOT_POSITIVE_DEFINITE}"]
