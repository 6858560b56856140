"""events.jsonl to what happened to each block, and how long all of it took."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lowbit.report.records import EventRecord


@dataclass
class BlockHistory:
    """The last try of one block. curve: the loss after each epoch. memory: bytes, at the peak."""

    curve: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float | None = None
    memory: int | None = None
    device_memory: int | None = None


@dataclass(frozen=True)
class History:
    """blocks: by number. warnings: of no block. starts: how often the command was called before it
    was done; seconds: what all of them took together. date: of the last event, seconds since 1970.
    """

    blocks: dict[int, BlockHistory]
    warnings: list[str]
    starts: int
    seconds: float
    date: float | None

    def of(self, number: int) -> BlockHistory:
        return self.blocks.get(number, BlockHistory())


def history_of(logged: Sequence[EventRecord]) -> History:
    """logged: in order. A call that found everything done is left out."""
    events = [event for event in logged if event.kind != "complete"]
    blocks: dict[int, BlockHistory] = {}
    warnings: list[str] = []
    for event in events:
        if event.kind == "block" and event.index is not None:
            blocks[event.index] = BlockHistory()  # an interrupted run had begun it before
        elif event.index in blocks:
            _note(blocks[event.index], event)
        elif event.kind == "warning" and event.text and event.text not in warnings:
            warnings.append(event.text)
    spans = list(_spans(events))
    date = events[-1].time if events else None
    return History(blocks, warnings, len(spans), sum(spans), date)


def _note(block: BlockHistory, event: EventRecord) -> None:
    if event.kind == "epoch" and event.loss is not None:
        if event.epoch == 1:
            block.curve.clear()  # a try that failed came before
        block.curve.append(event.loss)
    elif event.kind == "warning" and event.text and event.text not in block.warnings:
        block.warnings.append(event.text)
    elif event.kind == "finished":
        block.seconds = event.seconds
        block.memory, block.device_memory = event.memory, event.device_memory


def _spans(events: Iterable[EventRecord]) -> Iterable[float]:
    """Seconds from each start to the last that was heard of it."""
    first: float | None = None
    last = 0.0
    for event in events:
        if event.kind == "run":
            if first is not None:
                yield last - first
            first = event.time
        last = event.time
    if first is not None:
        yield last - first
