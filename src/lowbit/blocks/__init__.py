"""One transformer block in float32: the data classes through which models and methods meet.

A method knows nothing of model families, and a family knows nothing of methods. Both use
`LinearGroup` (which linears read the same input), `Fold` (where a scale per channel can be
absorbed) and `BlockTask` (what a method receives for one block). A method returns a
`lowbit.methods.result.BlockResult`.

Module names are relative to the block and are those of the model in memory, which may differ from
the names in the checkpoint: "self_attn.q_proj", "input_layernorm".
"""

import hashlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lowbit.blocks.stream import Batch, Stream
from lowbit.events import BlockLog
from lowbit.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from lowbit.blocks.hessian import Hessian

MAPS = ("source_rows", "source_channels", "reader_rows", "reader_channels")  # of a `Fold`

__all__ = ["Batch", "BlockTask", "Fold", "LinearGroup", "Stream"]


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that read the same input.

    They share all that belongs to the input: its statistics, its salient channels, its permutation
    and its rotation.

    name: identifies the group within the block.
    linears: the names of the linears.
    """

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Fold:
    """A place where channels can be rescaled without changing the block's output.

    A fold has `size` free channels. Each has one scale and, if the fold is `shiftable`, one shift.
    The source is divided by the scales, and every reader is multiplied by them:

    ========  ==========================  ==========================  =======================
    kind      divided in the source       multiplied in the readers   for example
    ========  ==========================  ==========================  =======================
    norm      the weight (and bias)       input columns               norm to q, k and v_proj
    values    output rows                 input columns               v_proj to o_proj
    gated     output rows                 input columns               up_proj to down_proj
    rotary    output rows, or the weight  output rows, or the weight  q_proj to k_proj, or
              of a norm                   of a norm                   q_norm to k_norm
    ========  ==========================  ==========================  =======================

    kind: see the table.
    source: the name of the module that is divided.
    readers: the names of ALL modules that read the source's output, a router included.
    size: the number of free channels.

    Four maps say which row or column belongs to which channel. They are int64 vectors; None means
    all, in order. With grouped-query attention several columns share a channel, and so do the two
    members of a rotary pair.

    source_rows: the rows of the source that the fold is about, where several matrices are fused
        into one (Falcon's query_key_value).
    source_channels: for each of these rows, the free channel that divides it.
    reader_rows: like source_rows, for the reader of a rotary fold.
    reader_channels: for each input column of a reader (rotary: for each of reader_rows), the free
        channel that multiplies it.
    shiftable: whether a shift can be absorbed, since the source and all readers have a bias.
    offset: what a norm adds to its weight before it multiplies (Gemma: 1).
    head_width: for a values fold, the channels of a head: those within a head can also be mixed by
        any invertible matrix, the same one in source and readers. 0: unknown.
    permutable: for a gated fold, whether the only other linear that reads the source's input is the
        gate, so that the rows of both can be permuted together.
    """

    kind: Literal["norm", "values", "gated", "rotary"]
    source: str
    readers: tuple[str, ...]
    size: int
    _: KW_ONLY
    source_rows: Tensor | None = None
    source_channels: Tensor | None = None
    reader_rows: Tensor | None = None
    reader_channels: Tensor | None = None
    shiftable: bool = False
    offset: float = 0.0
    permutable: bool = True
    head_width: int = 0

    @property
    def name(self) -> str:
        return f"{self.source}>{self.readers[0]}"

    def to(self, device: torch.device) -> "Fold":
        """Returns the fold with its maps on a device, where each use would copy them otherwise."""
        maps = {name: getattr(self, name) for name in MAPS}
        return replace(self, **{n: m.to(device) for n, m in maps.items() if m is not None})


@dataclass(kw_only=True)
class BlockTask:
    """What a method receives for one block.

    name: the block's path in the model, such as "model.layers.3".
    block: the block in float32; every weight matrix belongs to an nn.Linear.
    groups: the linears to quantize, grouped by the input that they read.
    folds: the places in the block where channels can be rescaled.
    streams: the inputs of this block, by the name of the stream ("float", "quantized").
    seed: the seed of the run; `generator` derives random numbers from it.
    log: takes warnings and the losses of epochs.
    start: what an earlier run learned for this block (its `BlockResult.learned`); training begins
        with these values.
    attentions: the names of the attention modules whose queries, keys and values can be rounded.
    output_hessians: how much the errors of each output of a linear matter to the model, by the
        linear's name; see `lowbit.blocks.output_hessian`. Empty: the method has not asked for it.
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
    output_hessians: Mapping[str, "Hessian"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = next((parameter.device for parameter in self.block.parameters()), None)
        if device is not None and device.type != "cpu":
            self.folds = tuple(fold.to(device) for fold in self.folds)

    @property
    def ranks(self) -> Ranks:
        """The processes that share the batches of the streams."""
        return next((stream.ranks for stream in self.streams.values()), ALONE)

    def generator(self, linear: str) -> torch.Generator:
        """Returns the random number generator of one linear, on the CPU.

        It is seeded by the run's seed, the block and the linear alone. A linear therefore gets the
        same numbers whatever the order of quantization, and also in a resumed run.
        """
        digest = hashlib.sha256(f"{self.seed} {self.name}.{linear}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
