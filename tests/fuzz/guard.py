"""Watches an example: it ends in time, and touches nothing outside its own folders."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 60  # an example takes about one; more is a hang
MARK = "a secret that stands in no result"
CALLS = ("open", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")

_forbidden: list[str] = []
_touched: list[str] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _forbidden and event in CALLS and isinstance(args[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(args[0]))
        if path.startswith(_forbidden[-1]):
            _touched.append(f"{event} {path}")


sys.addaudithook(_hook)


class Hang(BaseException):
    """An example took longer than SECONDS."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hang(f"not finished after {SECONDS} s")


@contextmanager
def guarded() -> Iterator[tuple[Path, Path]]:
    """Yields a folder for the example, and a folder beside it that it must not touch.

    The second holds files named like those of a model, each with a mark that no result may hold.
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-fuzz-") as temporary:
        root = Path(temporary).resolve()
        inside, outside = root / "inside", root / "outside"
        inside.mkdir()
        outside.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer_extra.json"):
            (outside / name).write_text(f'{{"mark": "{MARK}"}}')
        before = {path.name: path.read_bytes() for path in outside.iterdir()}
        _touched.clear()
        _forbidden.append(str(outside))
        old = signal.signal(signal.SIGALRM, _alarm)
        signal.alarm(SECONDS)
        try:
            yield inside, outside
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)
            _forbidden.pop()
        assert not _touched, f"outside the folders: {_touched}"
        assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
        for path in inside.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert MARK.encode() not in path.read_bytes(), f"{path} has a file from outside"
