"""Drawing the events of a run."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from lowbit.cli import progress
from lowbit.cli.progress import RunProgress
from lowbit.events import (
    BlockFinished,
    BlockResumed,
    BlockStarted,
    CalibrationRead,
    DryRunFinished,
    DryRunStarted,
    EpochFinished,
    Event,
    RunStarted,
    Warned,
)

pytestmark = pytest.mark.slow


class Flushed(io.StringIO):
    """Keeps the text that was readable at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def flush(self) -> None:
        self.seen = self.getvalue()


@pytest.fixture
def clock(monkeypatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def place(index: int, **data: Any) -> dict[str, Any]:
    return {"block": f"model.layers.{index}", "index": index, "of": 12} | data


def start(drawn: RunProgress) -> None:
    method = {"name": "omniquant", "epochs": 4}
    drawn(RunStarted(out="out", blocks=12, device="cpu", method=method))
    drawn(CalibrationRead(samples=128, seqlen=2048))


def test_plain_lines_are_flushed_one_by_one(clock):
    file = Flushed()
    with RunProgress(Console(file=file, width=40)) as drawn:
        start(drawn)
        assert file.seen == "12 blocks on cpu\ncalibration: 128 windows of 2048 tokens\n"
        drawn(BlockStarted(**place(0)))
        drawn(EpochFinished(**place(0, epoch=2, loss=0.5)))
        clock(30)
        drawn(BlockFinished(**place(0, loss_rtn=2e-5, loss_after=1.5e-5, seconds=30.2)))
        line = (
            "block  1/12  rtn loss 2.00e-05 → 1.50e-05   -25.0 %      30 s  about 5 min 30 s left"
        )
        assert file.seen.splitlines()[-1] == line  # in one piece, although wider than the screen
        drawn(BlockFinished(**place(11, seconds=0.04)))
        assert file.seen.splitlines()[-1] == "block 12/12     0.0 s"
        drawn(BlockFinished(**place(11, seconds=1, proxy_loss=0.0123)))
        assert file.seen.splitlines()[-1] == "block 12/12  proxy loss up to   0.0123     1.0 s"
    assert len(file.getvalue().splitlines()) == 5 and "\x1b" not in file.getvalue()


def test_an_estimate_counts_the_blocks_of_this_run_only(clock):
    file = Flushed()
    with RunProgress(Console(file=file)) as drawn:
        start(drawn)
        for index in range(8):
            drawn(BlockResumed(**place(index)))
        clock(1000)
        drawn(BlockStarted(**place(8)))
        clock(20)
        drawn(BlockFinished(**place(8, seconds=20)))
    assert "8 of 12 blocks: finished by an earlier run" in file.seen
    assert file.seen.endswith("about 1 min 00 s left\n")


def test_a_dry_run():
    file = Flushed()
    found = DryRunFinished(
        linears=4.125,
        model=5.0,
        bytes=3_370_000,
        learned=0,
        memory=1_500_000_000,
        seconds=4000.0,
        seconds_per_block=300.0,
        basis={},
    )
    with RunProgress(Console(file=file)) as drawn:
        drawn(DryRunStarted(blocks=12))
        assert drawn.bar.tasks[0].description == "dry run of one block"
        drawn(found)
    line = "4.12 bits per weight in the linears, 3.37 MB, 1.5 GB of memory, about 1 h 06 min"
    assert file.seen == f"dry run: {line}\n"


def test_warnings_name_their_block():
    file = Flushed()
    with RunProgress(Console(file=file)) as drawn:
        drawn(Warned(**place(3, text="non-finite loss")))
        drawn(Warned(text="of the whole run"))
    assert file.seen.splitlines() == [
        "warning: model.layers.3: non-finite loss",
        "warning: of the whole run",
    ]


def test_a_terminal_gets_a_bar(clock):
    file = Flushed()
    console = Console(file=file, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with RunProgress(console) as drawn:
        drawn.bar.refresh()
        assert "reading the model" in file.seen
        start(drawn)
        drawn(BlockStarted(**place(0)))
        clock(30)
        drawn(EpochFinished(**place(0, epoch=2, loss=0.0123)))
        drawn.bar.refresh()
        assert "block 1/12, epoch 2/4, loss 0.0123" in file.seen
        assert "about 11 min 30 s left" in file.seen
    assert file.getvalue().endswith("\x1b[2K")  # the bar is wiped away, the lines stay


def test_events_that_nothing_draws_are_left_out():
    class New(Event):
        kind = "something new"

    with RunProgress(Console(file=io.StringIO())) as drawn:
        drawn(New())
