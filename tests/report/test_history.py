"""The history of each block: only the last attempt counts, but the time of all of them."""

from typing import Any

from lowbit.events import (
    BlockFinished,
    BlockStarted,
    EpochFinished,
    Event,
    RunComplete,
    RunFinished,
    RunStarted,
    Warned,
)
from lowbit.report.history import history_of
from lowbit.report.records import LoggedEvent


def place(index: int) -> dict[str, Any]:
    return {"block": f"h.{index}", "index": index, "of": 2}


def epoch(index: int, number: int, loss: float) -> Event:
    return EpochFinished(epoch=number, loss=loss, **place(index))


STARTED = RunStarted(out="out", blocks=2, device="cpu", method={})
INTERRUPTED: list[tuple[float, Event | None]] = [
    (0, STARTED),
    (1, BlockStarted(**place(0))),
    (1.5, Warned(text="odd", **place(0))),
    (1.5, Warned(text="odd", **place(0))),
    (2, BlockFinished(seconds=1.0, memory=7, device_memory=9, **place(0))),
    (3, BlockStarted(**place(1))),
    (4, epoch(1, 1, 5.0)),
    (4, Warned(text="gone with its try", **place(1))),
    (100, STARTED),
    (100, Warned(text="of no block")),
    (101, BlockStarted(**place(1))),
    (102, epoch(1, 1, 4.0)),
    (103, epoch(1, 1, 3.5)),  # the first try met a loss that was not finite
    (104, epoch(1, 2, 3.0)),
    (104, epoch(7, 1, 9.0)),  # of a block that was never started
    (105, BlockFinished(seconds=4.0, **place(1))),
    (105.5, None),
    (106, RunFinished(out="out")),
    (900, RunComplete(out="out")),
]


def test_an_interrupted_run() -> None:
    found = history_of([LoggedEvent(time, event) for time, event in INTERRUPTED])
    assert (found.starts, found.seconds, found.date) == (2, 4.0 + 6.0, 106)
    assert found.warnings == ["of no block"]
    first, second = found.of(0), found.of(1)
    assert (first.seconds, first.memory, first.device_memory) == (1.0, 7, 9)
    assert first.warnings == ["odd"] and second.warnings == []
    assert second.curve == [3.5, 3.0] and second.memory is None


def test_no_events() -> None:
    found = history_of([])
    assert (found.starts, found.seconds, found.date) == (0, 0, None)
    assert found.of(3).curve == []
