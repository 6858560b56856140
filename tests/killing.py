"""Kills a run at its N-th change to the disk, without a change to its code.

CPython reports each file that is opened for writing, renamed, made or removed to audit hooks, and a
hook may raise an error. After the first error all further changes fail too, since a dead process
makes none.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHANGES = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "shutil.copyfile",
    "shutil.rmtree",
}


class Killed(BaseException):
    """Not a subclass of Exception, so that no code catches it."""


class Disk:
    """Counts the changes below `folder`; from number `last` on, each of them raises `error`.

    If the renaming of a temporary file fails, the file is cut in half, as if not all of its bytes
    had reached the disk.
    """

    def __init__(
        self, folder: Path, last: int | None = None, error: BaseException | None = None
    ) -> None:
        self.folder = str(folder)
        self.last = last
        self.error = Killed() if error is None else error
        self.count = 0

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        place = args[1] if event == "shutil.copyfile" else args[0]
        if not isinstance(place, str | Path) or not str(place).startswith(self.folder):
            return
        if event == "open" and not _writes(*args):
            return
        self.count += 1
        if self.last is None or self.count <= self.last:
            return
        if event == "os.rename" and os.path.isfile(place):
            with silent():
                os.truncate(place, os.path.getsize(place) // 2)
        raise self.error


_watched: list[Disk] = []


def _writes(path: Any, mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else mode[0] in "wax"


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watched and event in CHANGES:
        _watched[-1].see(event, args)


@contextmanager
def silent() -> Iterator[None]:
    held, _watched[:] = list(_watched), []
    try:
        yield
    finally:
        _watched[:] = held


@contextmanager
def watched(disk: Disk) -> Iterator[Disk]:
    _watched.append(disk)
    try:
        yield disk
    finally:
        _watched.remove(disk)


sys.addaudithook(_hook)  # for good: it does nothing while nothing is watched
