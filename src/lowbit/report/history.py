"""events.jsonl to what happened to each block, and how long all of it took."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lowbit.events import (
    BlockFinished,
    BlockStarted,
    EpochFinished,
    RunComplete,
    RunStarted,
    Warned,
)
from lowbit.report.records import LoggedEvent


@dataclass(kw_only=True)
class BlockHistory:
    """The last try of one block.

    curve: the loss after each epoch.
    memory, device_memory: bytes, at their peak.
    """

    curve: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float | None = None
    memory: int | None = None
    device_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class History:
    """What happened in a run.

    blocks: by number.
    warnings: those that concern no block.
    starts: how often the command was called before it was done.
    seconds: what all of these calls took together.
    date: of the last event, in seconds since 1970.
    """

    blocks: dict[int, BlockHistory]
    warnings: list[str]
    starts: int
    seconds: float
    date: float | None

    def of(self, number: int) -> BlockHistory:
        return self.blocks.get(number, BlockHistory())


def history_of(logged: Sequence[LoggedEvent]) -> History:
    """logged: in order. A call that found everything done is left out."""
    lines = [line for line in logged if not isinstance(line.event, RunComplete)]
    blocks: dict[int, BlockHistory] = {}
    warnings: list[str] = []
    for line in lines:
        match line.event:
            case BlockStarted(index=index):
                blocks[index] = BlockHistory()  # an interrupted run had begun it before
            case EpochFinished(index=index, epoch=epoch, loss=loss) if index in blocks:
                if epoch == 1:
                    blocks[index].curve.clear()  # a try that failed came before
                blocks[index].curve.append(loss)
            case BlockFinished(index=index) as finished if index in blocks:
                blocks[index].seconds = finished.seconds
                blocks[index].memory = finished.memory
                blocks[index].device_memory = finished.device_memory
            case Warned(index=index, text=text):
                block = None if index is None else blocks.get(index)
                place = warnings if block is None else block.warnings
                if text not in place:
                    place.append(text)
    spans = list(_spans(lines))
    date = lines[-1].time if lines else None
    return History(
        blocks=blocks, warnings=warnings, starts=len(spans), seconds=sum(spans), date=date
    )


def _spans(lines: Iterable[LoggedEvent]) -> Iterable[float]:
    """Seconds from each start to the last event that followed it."""
    first: float | None = None
    last = 0.0
    for line in lines:
        if isinstance(line.event, RunStarted):
            if first is not None:
                yield last - first
            first = line.time
        last = line.time
    if first is not None:
        yield last - first
