"""Falcon: queries, keys and values are rows of one matrix, in three arrangements.

7B: multi-query attention (rows of all queries, one key, one value). Attention and MLP run in
    parallel and read the output of one norm.
40B, 180B (`new_decoder_architecture`): for each key head the rows of its queries, its key and its
    value. Attention and MLP run in parallel and read two norms, or one in 11B
    (`num_ln_in_parallel_attn`).
RW: query, key and value for each head, ALiBi. Attention and MLP run one after the other.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit.models.family import Family, FoldRule, Group, Heads

QKV = "self_attention.query_key_value"
UP = "mlp.dense_h_to_4h"


def _norms(config: Any) -> dict[str, tuple[str, ...]]:
    """The linears that read each norm, by the name of the norm."""
    two = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    if config.parallel_attn and two:
        return {"ln_attn": (QKV,), "ln_mlp": (UP,)}
    if config.parallel_attn:
        return {"input_layernorm": (QKV, UP)}
    return {"input_layernorm": (QKV,), "post_attention_layernorm": (UP,)}


def _groups(config: Any) -> tuple[Group, ...]:
    names = {(QKV,): "attention.input", (UP,): "mlp.input", (QKV, UP): "block.input"}
    inputs = [Group(names[readers], readers) for readers in _norms(config).values()]
    return (
        *inputs,
        Group("attention.output", ("self_attention.dense",)),
        Group("mlp.output", ("mlp.dense_4h_to_h",)),
    )


def _heads(config: Any) -> Heads:
    if config.new_decoder_architecture:
        keys = config.num_kv_heads
    else:
        keys = 1 if config.multi_query else config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    rotary = 0 if config.alibi else width
    return Heads(config.num_attention_heads, keys, width, rotary)


def _parts(config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows of queries, of keys and of values in the fused matrix, in order of heads."""
    heads = _heads(config)
    # This holds for all three arrangements: per key head its queries, then the key, then the value.
    rows = torch.arange((heads.queries + 2 * heads.keys) * heads.width)
    rows = rows.view(heads.keys, heads.queries // heads.keys + 2, heads.width)
    return rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()


def query_rows(config: Any) -> Tensor:
    return _parts(config)[0]


def key_rows(config: Any) -> Tensor:
    return _parts(config)[1]


def value_rows(config: Any) -> Tensor:
    return _parts(config)[2]


def _folds(config: Any) -> tuple[FoldRule, ...]:
    return (
        *(FoldRule("norm", norm, readers) for norm, readers in _norms(config).items()),
        FoldRule("values", QKV, ("self_attention.dense",), _heads, value_rows),
        FoldRule("rotary", QKV, (QKV,), _heads, query_rows, key_rows),
    )


FALCON = Family(
    name="falcon",
    architectures=("FalconForCausalLM",),
    blocks="transformer.h",
    groups=_groups,
    folds=_folds,
    tuple_output=1,
)
