"""The classes of which the tables of model families are made.

A family is data: it says which linears read the same input, and where scales can be folded. It is
chosen by the architecture in config.json.

Names of modules are relative to a block, as in transformers' model in memory; `*` stands for the
number of an expert. If a block has none of the modules of a rule, the rule does not apply to it
(Qwen3-MoE mixes dense and sparse blocks). If it has only some of them, that is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.blocks import Fold
from lowbit.blocks.handed import Handed


@dataclass(frozen=True)
class Group:
    """Linears that read the same input."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Heads:
    """The heads of an attention.

    queries: number of query heads.
    keys: number of key heads, and of value heads.
    width: channels of one head.
    rotary: channels of a head that RoPE rotates, in pairs (i, i + rotary / 2); 0: none.
    """

    queries: int
    keys: int
    width: int
    rotary: int


def heads_of(config: Any) -> Heads:
    """Returns the numbers and the width of attention heads, from a config.

    config: has Llama's field names, which most families use.
    """
    queries = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    partial = getattr(config, "partial_rotary_factor", None) or 1.0
    return Heads(
        queries=queries,
        keys=getattr(config, "num_key_value_heads", None) or queries,
        width=width,
        rotary=int(width * partial),
    )


Rows = Callable[[Any], Tensor]  # from a config to row indices of one matrix, int64


@dataclass(frozen=True)
class FoldRule:
    """A place where a scale can be folded into two modules, without the sizes of a given model.

    kind: see `lowbit.blocks.Fold`.
    source: the module whose weights are divided by the scale.
    readers: the modules whose weights are multiplied by it.
    heads: a function of the config that returns the attention heads; used by "values" and "rotary".
    source_rows, reader_rows: functions of the config that return the rows of a fused matrix to
        which the fold applies (Falcon's query_key_value, Phi-3's gate_up_proj); None: all rows.
    """

    kind: Literal["norm", "values", "gated", "rotary"]
    source: str
    readers: tuple[str, ...]
    heads: Callable[[Any], Heads] = heads_of
    source_rows: Rows | None = None
    reader_rows: Rows | None = None


@dataclass(frozen=True)
class Family:
    """The table of one model family.

    name: the name of the family.
    architectures: the values of `architectures` in config.json for which it is used.
    blocks: path of the list of blocks in the model.
    groups, folds: functions of the config; `always` makes one that does not depend on it.
    skip: names of matrices that are never quantized, such as routers.
    tuple_output: the number of values in the tuple that a block returns, of which the hidden states
        are the first; 0: it returns the hidden states alone.
    by_block: the groups of each block of one model, where they were found by running it; empty: all
        blocks have those of `groups`.
    search: finds the folds of a block by experiment, given the block and its index; None: the folds
        are those of `folds`.
    handed: what a block hands to the next one besides the hidden states: `lowbit.blocks.handed`.
    """

    name: str
    architectures: tuple[str, ...]
    blocks: str
    groups: Callable[[Any], tuple[Group, ...]]
    folds: Callable[[Any], tuple[FoldRule, ...]]
    skip: tuple[str, ...] = ()
    tuple_output: int = 0
    by_block: tuple[tuple[Group, ...], ...] = ()
    handed: Handed = ()
    search: Callable[[nn.Module, int], tuple[Fold, ...]] | None = None


def always(*items: Any) -> Callable[[Any], tuple[Any, ...]]:
    """Returns a function of the config that returns the same items for every config."""
    return lambda config: items


def rotary_channels(heads: Heads) -> tuple[Tensor, int]:
    """Returns the index of the scale of each key channel under RoPE, and the number of scales.

    The two channels of a rotary pair have one scale in common; each channel that RoPE does not
    rotate has its own.

    Returns (keys, width) int64, and the number of different scales.
    """
    half = heads.rotary // 2
    within = torch.cat(
        [torch.arange(half), torch.arange(half), torch.arange(half, heads.width - half)]
    )
    free = heads.width - half
    return torch.arange(heads.keys)[:, None] * free + within, heads.keys * free
