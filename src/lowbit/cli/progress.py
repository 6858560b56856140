"""Draw the events of a run: a line for every finished block and, on a terminal, a bar below."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from lowbit.blocks import Event
from lowbit.cli.screen import change, duration, size

INTERRUPTED = 130  # the exit status of a program that was stopped with Ctrl-C


@contextmanager
def stoppable_run(console: Console, on_stop: str) -> Iterator["RunProgress"]:
    """A run's progress; Ctrl-C says `on_stop` and ends the command."""
    try:
        with RunProgress(console) as progress:
            yield progress
    except KeyboardInterrupt:
        console.print(f"stopped: {on_stop}")
        raise typer.Exit(INTERRUPTED) from None


class RunProgress:
    """A context manager to be called with every event; `finished_before` once OUT was complete."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.finished_before = False
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="dim"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("reading the model", total=None, left="")
        self.epochs = 0
        self.started: float | None = None  # when the first block of this run was begun
        self.before = 0  # blocks that an earlier run had finished
        self.draw: dict[str, Callable[[dict[str, Any]], None]] = {
            "run": self._run,
            "rehearsal": self._rehearsal,
            "rehearsed": self._rehearsed,
            "capture": self._capture,
            "block": self._block,
            "epoch": self._epoch,
            "warning": self._warning,
            "resumed": self._resumed,
            "finished": self._finished,
            "complete": self._complete,
            "training": self._training,
            "step": self._step,
        }

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        if event.kind in self.draw:
            self.draw[event.kind](event.data)

    def _line(self, *parts: str | tuple[str, str]) -> None:
        # soft_wrap: a line stays one line, however narrow the terminal.
        self.console.print(Text.assemble(*parts), soft_wrap=True)

    def _run(self, data: dict[str, Any]) -> None:
        self.epochs = data["method"].get("epochs", 0)
        self.bar.update(self.task, total=data["blocks"])
        self._line(f"{data['blocks']} blocks on {data['device']}")

    def _rehearsal(self, data: dict[str, Any]) -> None:
        self.bar.update(self.task, description="rehearsing a block")

    def _rehearsed(self, data: dict[str, Any]) -> None:
        facts = (
            f"{data['linears']:.2f} bits per weight in the linears",
            size(data["bytes"]),
            f"{size(data['memory'])} of memory",
            f"about {duration(data['seconds'])}",
        )
        self._line(f"rehearsed: {', '.join(facts)}")

    def _capture(self, data: dict[str, Any]) -> None:
        self._line(f"calibration: {data['samples']} windows of {data['seqlen']} tokens")
        self.bar.update(self.task, description="reading the text")

    def _block(self, data: dict[str, Any]) -> None:
        if self.started is None:
            self.started, self.before = time.monotonic(), data["index"]
            if self.before:
                self._line(f"{self.before} of them were finished by an earlier run")
        self._move(data["index"], data["of"], f"block {data['index'] + 1}/{data['of']}")

    def _epoch(self, data: dict[str, Any]) -> None:
        where = f"block {data['index'] + 1}/{data['of']}, epoch {data['epoch']}/{self.epochs}"
        done = data["index"] + data["epoch"] / max(self.epochs, data["epoch"])
        self._move(done, data["of"], f"{where}, loss {data['loss']:#.3g}")

    def _warning(self, data: dict[str, Any]) -> None:
        place = "" if data["text"].startswith(data["block"]) else f"{data['block']}: "
        self._line(("warning: ", "yellow"), place + data["text"])

    def _resumed(self, data: dict[str, Any]) -> None:
        self._move(data["index"] + 1, data["of"], "catching up with an earlier run")

    def _finished(self, data: dict[str, Any]) -> None:
        done = data["index"] + 1
        count = f"{done:{len(str(data['of']))}}/{data['of']}"
        parts: list[str | tuple[str, str]] = [f"block {count}"]
        if "loss_rtn" in data and "loss_after" in data:
            before, after = data["loss_rtn"], data["loss_after"]
            parts += [
                f"  rtn loss {before:#8.3g} → {after:#8.3g}",
                (f"  {change(after, before):>8}", "green" if after < before else "yellow"),
            ]
        if "proxy_loss" in data:
            parts += [f"  proxy loss up to {data['proxy_loss']:#8.3g}"]
        parts += [f"  {duration(data['seconds']):>8}"]
        left = self._left(done, data["of"])
        self._line(*parts, (f"  {left}", "dim") if left else "")
        self._move(done, data["of"], f"block {done}/{data['of']}")

    def _training(self, data: dict[str, Any]) -> None:
        self.started = time.monotonic()
        self.before = 0
        self._line(f"training: {data['steps']:,} steps, {data['tokens']:,} tokens")
        self.bar.update(self.task, total=data["steps"])

    def _step(self, data: dict[str, Any]) -> None:
        place = f"step {data['step']:,}/{data['of']:,}, loss {data['loss']:.3f}"
        self._move(data["step"], data["of"], place)
        if not self.console.is_terminal:
            self._line(place)

    def _complete(self, data: dict[str, Any]) -> None:
        self.finished_before = True

    def _move(self, done: float, of: int, description: str) -> None:
        self.bar.update(
            self.task, completed=done, description=description, left=self._left(done, of)
        )

    def _left(self, done: float, of: int) -> str:
        """An estimate from the blocks of this run alone."""
        mine = done - self.before
        if self.started is None or mine <= 0 or done >= of:
            return ""
        seconds = (time.monotonic() - self.started) / mine * (of - done)
        return f"about {duration(seconds)} left" if seconds >= 1 else ""
