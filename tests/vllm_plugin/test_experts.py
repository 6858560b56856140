"""Experts in a stand-in of vLLM compute what lowbit.load computes."""

from typing import Any

import pytest
import quantized
import torch
import vllm_stand_in
import zoo
from torch.nn import functional
from vllm_stand_in import RoutedExperts

import lowbit

pytestmark = pytest.mark.slow

BLOCK = "model.layers.0.mlp"


def test_experts(vllm: Any) -> None:
    folder = quantized.folder("qwen3_moe")
    layer = RoutedExperts(vllm.config(quantized.section(folder)), f"{BLOCK}.experts", 4)
    for number in range(4):
        for last in ("down_proj", "up_proj", "gate_proj"):
            tensors = vllm_stand_in.tensors_of(folder, f"{BLOCK}.experts.{number}.{last}")
            vllm_stand_in.load_expert(layer, number, last, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    draw = torch.Generator().manual_seed(0)
    x, weights = torch.randn(6, 48, generator=draw), torch.rand(6, 2, generator=draw)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [0, 2], [2, 1]])  # never expert 3
    with torch.inference_mode():
        found = layer.quant_method.apply(layer, x, weights, chosen, None, None)
    model = lowbit.load(folder)[0]
    for token in range(6):
        wanted = torch.zeros(48)
        for weight, number in zip(weights[token], chosen[token], strict=True):
            expert = model.get_submodule(f"{BLOCK}.experts.{int(number)}")
            gate, up = expert.gate_proj(x[token]), expert.up_proj(x[token])
            wanted += weight * expert.down_proj(functional.silu(gate) * up)
        assert zoo.error(found[token], wanted) < 1e-5


def test_several_devices_are_refused(vllm: Any) -> None:
    config = vllm.config(quantized.section(quantized.folder("qwen3_moe")))
    with pytest.raises(ValueError, match=r"layer .*experts.0.* are not shared among devices"):
        RoutedExperts(config, f"{BLOCK}.experts", 4, tp_size=2)
