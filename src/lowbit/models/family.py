"""What the tables in this folder are made of: a family is data, chosen by its architecture.

Names are relative to a block, as transformers has them in memory; `*` stands for the number of an
expert. A rule whose modules a block does not have does not apply to that block (Qwen3-MoE mixes
dense and sparse blocks), but a rule that matches by halves is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Linears that read the same input."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class FoldRule:
    """A Fold before the sizes are known; see `lowbit.blocks.Fold` for the kinds."""

    kind: Literal["norm", "values", "gated", "rotary"]
    source: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Heads:
    """The geometry of attention, as config.json has it."""

    queries: int
    keys: int  # key and value heads
    width: int  # channels of one head
    rotary: int  # channels of a head that RoPE turns, in pairs (i, i + rotary / 2); 0: none


@dataclass(frozen=True)
class FusedRows:
    """Which rows of one fused matrix are the queries, keys and values; int64, heads in order."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def heads_of(config: Any) -> Heads:
    """Llama's conventions, which most families share."""
    queries = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    partial = getattr(config, "partial_rotary_factor", None) or 1.0
    return Heads(
        queries=queries,
        keys=getattr(config, "num_key_value_heads", None) or queries,
        width=width,
        rotary=int(width * partial),
    )


@dataclass(frozen=True)
class Family:
    """One table. `groups` and `folds` are functions of config.json only where it changes them."""

    name: str
    architectures: tuple[str, ...]
    blocks: str  # path of the list of blocks
    groups: Callable[[Any], tuple[Group, ...]]
    folds: Callable[[Any], tuple[FoldRule, ...]]
    skip: tuple[str, ...] = ()  # matrices that are never quantized
    heads: Callable[[Any], Heads] = heads_of
    fused_rows: Callable[[Any], FusedRows] | None = None
    tuple_output: bool = False  # a block returns (hidden, ...) instead of hidden


def always(*items: Any) -> Callable[[Any], tuple[Any, ...]]:
    """A table that does not depend on config.json."""
    return lambda config: items


def rotary_channels(heads: Heads) -> tuple[Tensor, int]:
    """Which free channel each (key head, channel) has, (keys, width) int64, and how many there are.

    The two members of a rotary pair share one; channels that RoPE leaves alone are free.
    """
    half = heads.rotary // 2
    within = torch.cat(
        [torch.arange(half), torch.arange(half), torch.arange(half, heads.width - half)]
    )
    free = heads.width - half
    return torch.arange(heads.keys)[:, None] * free + within, heads.keys * free
