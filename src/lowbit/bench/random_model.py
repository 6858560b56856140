"""Builds a Llama of random weights, whose speed is that of a real one of the same shape."""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lowbit.bench.shapes import HEAD, OWNERS, Shape, parse_format
from lowbit.formats import repack
from lowbit.formats.base import QuantizedLinear
from lowbit.load import replace_linears

CONTEXT = 2048  # tokens
SEED = 0


def random_quantized(shape: Shape, form: str) -> PreTrainedModel:
    """Returns a Llama whose linears have a format, with an output layer of 8 bits.

    form: the format, as `parse_format` reads it.
    """
    model = _without_weights(shape)
    replace_linears(model, _entries(shape, form))
    fill(model, torch.float32)
    repack(model)
    return model


def random_float(shape: Shape, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a Llama of a float dtype, as transformers has it."""
    model = _without_weights(shape)
    fill(model, dtype)
    return model


def _entries(shape: Shape, form: str) -> dict[str, dict[str, Any]]:
    entry = parse_format(form)
    entries = {}
    for number in range(shape.layers):
        block = f"model.layers.{number}."
        for name, size in shape.linears.items():
            owner = OWNERS.get(name)
            entries[block + name] = entry(size, None if owner is None else block + owner)
    entries["lm_head"] = parse_format(HEAD)((shape.vocabulary, shape.hidden), None)
    return entries


def _without_weights(shape: Shape) -> Any:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.wide,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    with init_empty_weights(include_buffers=False):
        return LlamaForCausalLM(config).eval()


def fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every parameter on the meta device random values that are allowed."""
    draw, made = torch.Generator().manual_seed(SEED), dict[Any, Tensor]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            key = (type(module), name, parameter.shape, parameter.dtype)
            if key not in made:  # values do not change the speed, so equal layers get equal ones
                made[key] = _values(module, name, parameter, dtype, draw)
            value = nn.Parameter(made[key].clone(), requires_grad=False)
            setattr(module, name, value)


def _values(
    module: nn.Module, name: str, like: Tensor, dtype: torch.dtype, draw: torch.Generator
) -> Tensor:
    if not isinstance(module, QuantizedLinear):
        if like.ndim == 1:
            return torch.ones(like.shape, dtype=dtype)
        small = torch.randn(like.shape, generator=draw) * like.shape[-1] ** -0.5
        return small.to(dtype)
    empty = torch.empty(like.shape, dtype=like.dtype)
    if name == "permutation":
        return torch.randperm(len(empty), generator=draw).to(like.dtype)
    if name == "mask":  # as many bits as there are salient channels
        salient = module.entry()["salient"]
        bits = (torch.arange(8 * len(empty)) < salient).view(-1, 8)
        return (bits * 2 ** torch.arange(8)).sum(1).to(like.dtype)
    if empty.is_floating_point():
        return empty.uniform_(0.001, 0.002, generator=draw)
    low, high = (-127, 128) if like.dtype == torch.int8 else (0, 256)
    return empty.random_(low, high, generator=draw)
