"""What the tables in this folder are made of: a family is data, chosen by its architecture.

Names are relative to a block, as transformers has them in memory; `*` stands for the number of an
expert. A rule whose modules a block does not have does not apply to that block (Qwen3-MoE mixes
dense and sparse blocks), but a rule of which a block has some modules and not others is an error.
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
class Heads:
    """The geometry of attention, as config.json has it."""

    queries: int
    keys: int  # key and value heads
    width: int  # channels of one head
    rotary: int  # channels of a head that RoPE turns, in pairs (i, i + rotary / 2); 0: none


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


Rows = Callable[[Any], Tensor]  # a config to row numbers of one matrix, int64


@dataclass(frozen=True)
class FoldRule:
    """A fold before the sizes are known; `lowbit.blocks.Fold` explains the kinds.

    source: the module that is divided; readers: the modules that are multiplied.
    heads: the attention heads, a function of the config; used by "values" and "rotary".
    source_rows, reader_rows: functions of the config that pick the rows of a fused matrix which
        belong to this fold (Falcon's query_key_value, Phi-3's gate_up_proj); None: all rows.
    """

    kind: Literal["norm", "values", "gated", "rotary"]
    source: str
    readers: tuple[str, ...]
    heads: Callable[[Any], Heads] = heads_of
    source_rows: Rows | None = None
    reader_rows: Rows | None = None


@dataclass(frozen=True)
class Family:
    """One table. `groups` and `folds` are functions of config.json only where it changes them."""

    name: str
    architectures: tuple[str, ...]
    blocks: str  # path of the list of blocks
    groups: Callable[[Any], tuple[Group, ...]]
    folds: Callable[[Any], tuple[FoldRule, ...]]
    skip: tuple[str, ...] = ()  # matrices that are never quantized
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
