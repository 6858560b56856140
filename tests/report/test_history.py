"""What events say of each block: the last try counts, and time that was lost counts too."""

from typing import Any

from lowbit.report.history import history_of
from lowbit.report.records import EventRecord


def events(*lines: tuple[float, str, dict[str, Any]]) -> list[EventRecord]:
    return [EventRecord(time=time, kind=kind, **data) for time, kind, data in lines]


def epoch(time: float, index: int, number: int, loss: float | None) -> tuple[float, str, Any]:
    return time, "epoch", {"index": index, "epoch": number, "loss": loss}


INTERRUPTED = events(
    (0, "run", {}),
    (1, "block", {"index": 0}),
    (1.5, "warning", {"index": 0, "text": "odd"}),
    (1.5, "warning", {"index": 0, "text": "odd"}),
    (2, "finished", {"index": 0, "seconds": 1.0, "memory": 7, "device_memory": 9}),
    (3, "block", {"index": 1}),
    epoch(4, 1, 1, 5.0),
    (4, "warning", {"index": 1, "text": "gone with its try"}),
    (100, "run", {}),
    (100, "warning", {"text": "of no block"}),
    (101, "block", {"index": 1}),
    epoch(102, 1, 1, 4.0),
    epoch(103, 1, 1, 3.5),  # the first try met a loss that was not finite
    epoch(104, 1, 2, 3.0),
    epoch(104, 1, 3, None),
    (105, "finished", {"index": 1, "seconds": 4.0}),
    (106, "done", {}),
    (900, "complete", {}),
)


def test_an_interrupted_run() -> None:
    found = history_of(INTERRUPTED)
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
