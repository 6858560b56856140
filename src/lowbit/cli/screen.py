"""The terminal or pipe that commands write to."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowbit.quantities import change, duration, size

__all__ = ["change", "console", "duration", "shortened", "size"]

PLAIN_WIDTH = 200  # columns of a file or a pipe: tables are not folded there
TEXT_WIDTH = 80  # columns of running text, which is easier to read in short lines


def console(stderr: bool = False) -> Console:
    """stdout or stderr. Text is printed as it is, since paths may look like rich's markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def text_width(screen: Console) -> int:
    """Columns of running text."""
    return min(screen.width, TEXT_WIDTH)


def counting_bar() -> Progress:
    """A progress bar on stderr, which disappears when it is done; none in a pipe."""
    screen = console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn()
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )


def shortened(names: list[str], most: int = 3) -> str:
    """The first few names and the number of all others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
