"""What a run reports while it works: what `on_event` gets, and the lines of OUT/events.jsonl.

There is one class for each kind of event. Its `kind` is the word by which events.jsonl names it;
its fields are the other keys of the line, beside the time. A field that is None is left out.

A run emits, in this order:

    DryRunStarted                     before a long run, or on request
    RunStarted                        DryRunFinished follows if there was a dry run
    CalibrationRead                   for a method that reads text
    BlockResumed                      for each block that an earlier run finished
    BlockStarted                      for each other block, then
        EpochFinished, Warned         any number of them
    BlockFinished
    RunFinished

or RunComplete alone, where nothing was left to do. `lowbit.preprocess` emits the events of its
first pass, then TrainingStarted, TrainingStep after every few steps, and RunFinished.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The kind and all fields that are known, as events.jsonl has them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        known = {name: value for name, value in values.items() if value is not None}
        return {"kind": self.kind, **known}


OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run begins or goes on.

    out: the folder that is written.
    blocks: how many blocks the model has.
    device: where the run computes, as torch names it.
    method: the method's name and fields.
    """

    kind: ClassVar[str] = "run"

    out: str
    blocks: int
    device: str
    method: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DryRunStarted(Event):
    """One block is quantized for trial, before the run. blocks: how many blocks the model has."""

    kind: ClassVar[str] = "rehearsal"

    blocks: int


@dataclass(frozen=True, kw_only=True)
class DryRunFinished(Event):
    """What the run will take, according to the dry run: the fields of `lowbit.Estimate`."""

    kind: ClassVar[str] = "rehearsed"

    linears: float
    model: float
    bytes: int
    learned: int
    memory: int
    device_memory: int | None = None
    seconds: float
    seconds_per_block: float
    basis: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CalibrationRead(Event):
    """The calibration text is there: `samples` windows of `seqlen` tokens."""

    kind: ClassVar[str] = "capture"

    samples: int
    seqlen: int


@dataclass(frozen=True, kw_only=True)
class BlockEvent(Event):
    """Something that happened to a block.

    block: its name, as in "model.layers.3".
    index: its number, from 0.
    of: how many blocks the model has.
    """

    block: str
    index: int
    of: int


@dataclass(frozen=True, kw_only=True)
class BlockStarted(BlockEvent):
    """A block begins to be quantized."""

    kind: ClassVar[str] = "block"


@dataclass(frozen=True, kw_only=True)
class EpochFinished(BlockEvent):
    """A pass over the calibration text ended. epoch: from 1. loss: the mean over all batches."""

    kind: ClassVar[str] = "epoch"

    epoch: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class BlockResumed(BlockEvent):
    """A block is taken over as an earlier run left it."""

    kind: ClassVar[str] = "resumed"


@dataclass(frozen=True, kw_only=True)
class BlockFinished(BlockEvent):
    """A block is quantized and written.

    loss_rtn, loss_after: the loss of rounding to nearest, and of what was written.
    proxy_loss: the largest of its linears.
    seconds: since it was started.
    memory: the most bytes that the process held, without mapped files.
    device_memory: the most bytes that torch held on a CUDA device.
    """

    kind: ClassVar[str] = "finished"

    loss_rtn: float | None = None
    loss_after: float | None = None
    proxy_loss: float | None = None
    seconds: float
    memory: int | None = None
    device_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something did not go as it was meant to. block, index, of: where, if it was in a block."""

    kind: ClassVar[str] = "warning"

    block: str | None = None
    index: int | None = None
    of: int | None = None
    text: str


@dataclass(frozen=True, kw_only=True)
class RunComplete(Event):
    """An earlier run had finished everything. out: the folder."""

    kind: ClassVar[str] = "complete"

    out: str


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """Everything is written. out: the folder."""

    kind: ClassVar[str] = "done"

    out: str


@dataclass(frozen=True, kw_only=True)
class TrainingStarted(Event):
    """`lowbit.preprocess` begins to train: `steps` updates on `tokens` tokens in all."""

    kind: ClassVar[str] = "training"

    steps: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TrainingStep(Event):
    """`lowbit.preprocess` has taken `step` of its steps. loss: the mean since the last event."""

    kind: ClassVar[str] = "step"

    step: int
    of: int
    loss: float


KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        *(RunStarted, DryRunStarted, DryRunFinished, CalibrationRead),
        *(BlockStarted, EpochFinished, BlockResumed, BlockFinished, Warned),
        *(RunComplete, RunFinished, TrainingStarted, TrainingStep),
    )
}


@dataclass(frozen=True, kw_only=True)
class BlockLog:
    """How a method reports what happens in a block: every event gets the block's place.

    emit: takes the events. block, index, of: as in `BlockEvent`.
    """

    emit: OnEvent
    block: str
    index: int
    of: int

    def warn(self, text: str) -> None:
        """Something did not go as it was meant to."""
        self.emit(Warned(text=text, block=self.block, index=self.index, of=self.of))

    def epoch(self, number: int, loss: float) -> None:
        """A pass over the calibration text ended. number: from 1."""
        self.emit(
            EpochFinished(block=self.block, index=self.index, of=self.of, epoch=number, loss=loss)
        )
