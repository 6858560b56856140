"""One transformer block in float: the words that methods and models share.

A method does not know the model and a model does not know the method. They meet in `LinearGroup`
(which linears read the same input), `Fold` (where a per-channel change can be absorbed) and
`BlockTask` / `BlockResult` (what goes into a method, and what comes out).

Names are relative to the block, as in memory: "self_attn.q_proj", "input_layernorm".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.blocks.stream import Batch, Stream

__all__ = ["Batch", "BlockResult", "BlockTask", "Event", "Fold", "LinearGroup", "Stream"]


@dataclass(frozen=True)
class Event:
    """Something that the pipeline or a method tells the world; written to OUT/events.jsonl."""

    kind: str  # "run", "block", "epoch", "warning", ...
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input: one statistic, one mask, one permutation, one rotation."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Fold:
    """Where a per-channel change can be absorbed so that the block's output stays the same.

    A fold has `size` free channels, each with one scale (and, where `shiftable`, one shift).
    `source` is divided by the scale and every reader is multiplied by it:

    ========  ======================  =====================================================
    kind      source is divided       readers are multiplied
    ========  ======================  =====================================================
    norm      its weight (and bias)   input columns
    values    output rows             input columns (v_proj to o_proj)
    gated     output rows             input columns (up_proj to down_proj, times the gate)
    rotary    rows, or norm weight    rows, or norm weight (queries against keys)
    ========  ======================  =====================================================

    The maps are int64 vectors, None for "all, in order". `source_rows` picks rows of a fused
    matrix (Falcon's query_key_value); `source_channels[i]` is the free channel that divides the
    i-th of them, `reader_channels[i]` the one that multiplies the i-th column (rotary: the i-th of
    `reader_rows`). Grouped-query attention repeats channels; the two members of a rotary pair
    share one.
    """

    kind: Literal["norm", "values", "gated", "rotary"]
    source: str
    readers: tuple[str, ...]  # ALL modules that read the source, the router included
    size: int
    source_rows: Tensor | None = None
    source_channels: Tensor | None = None
    reader_rows: Tensor | None = None
    reader_channels: Tensor | None = None
    shiftable: bool = False  # a shift can be absorbed: source and readers have biases

    @property
    def name(self) -> str:
        return f"{self.source}>{self.readers[0]}"


@dataclass
class BlockTask:
    """All that a method sees of one block."""

    name: str  # "model.layers.3"
    block: nn.Module  # float32; every matrix an nn.Linear
    groups: tuple[LinearGroup, ...]
    folds: tuple[Fold, ...]
    streams: Mapping[str, Stream]  # the inputs of this block, by stream name
    # Seeded by seed and block name: a resumed block draws the same numbers.
    generator: torch.Generator
    log: Callable[[Event], None]
    # What an earlier run learned for this block (its `BlockResult.learned`): where to begin.
    start: Mapping[str, Tensor] = field(default_factory=dict)
    attentions: tuple[str, ...] = ()  # modules whose queries, keys and values can be rounded


@dataclass
class BlockResult:
    """All that a method says about one block."""

    linears: dict[str, nn.Module]  # QuantizedLinear by the name of the linear that it replaces
    tensors: dict[str, Tensor] = field(default_factory=dict)  # EVERYTHING else that changed
    # How queries, keys and values are rounded, by attention: {"bits": ..., "symmetric": ...}.
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)  # to OUT/learned/
    report: dict[str, Any] = field(default_factory=dict)
