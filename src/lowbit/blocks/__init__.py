"""One transformer block in float: the words that methods and models share.

A method does not know the model and a model does not know the method. They meet in `LinearGroup`
(which linears read the same input), `Fold` (where a per-channel change can be absorbed) and
`BlockTask` (what a method gets). What a method returns is `lowbit.methods.result.BlockResult`.

Names are relative to the block, as in memory: "self_attn.q_proj", "input_layernorm".
"""

import hashlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.blocks.stream import Batch, Stream
from lowbit.events import BlockLog

__all__ = ["Batch", "BlockTask", "Fold", "LinearGroup", "Stream"]


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
    _: KW_ONLY
    source_rows: Tensor | None = None
    source_channels: Tensor | None = None
    reader_rows: Tensor | None = None
    reader_channels: Tensor | None = None
    shiftable: bool = False  # a shift can be absorbed: source and readers have biases

    @property
    def name(self) -> str:
        return f"{self.source}>{self.readers[0]}"


@dataclass(kw_only=True)
class BlockTask:
    """All that a method sees of one block.

    name: the block's, as in "model.layers.3".
    block: in float32; every matrix is an nn.Linear.
    groups, folds: of its linears.
    streams: the inputs of this block, by the name of the stream.
    seed: of the run; see `generator`.
    log: reports what happens.
    start: what an earlier run learned for this block (its `BlockResult.learned`): where to begin.
    attentions: modules whose queries, keys and values can be rounded.
    """

    name: str
    block: nn.Module
    groups: tuple[LinearGroup, ...]
    folds: tuple[Fold, ...]
    streams: Mapping[str, Stream]
    seed: int
    log: BlockLog
    start: Mapping[str, Tensor] = field(default_factory=dict)
    attentions: tuple[str, ...] = ()

    def generator(self, linear: str) -> torch.Generator:
        """The random numbers of one linear, on the CPU.

        They depend on seed, block and linear alone: in whatever order linears are quantized, and
        wherever a run goes on, each gets the same numbers.
        """
        digest = hashlib.sha256(f"{self.seed} {self.name}.{linear}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
