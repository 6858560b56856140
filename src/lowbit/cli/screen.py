"""Writes to the terminal, or to a file or pipe."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowbit.quantities import change, duration, size
from lowbit.together import index_from_environment

__all__ = ["change", "console", "duration", "shortened", "size"]

PLAIN_WIDTH = 200  # columns in a file or a pipe, where tables need not be narrow
TEXT_WIDTH = 80  # columns of running text, which is easier to read in short lines


def console(stderr: bool = False) -> Console:
    """Returns a console without rich's markup, since paths may look like markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    quiet = not stderr and index_from_environment() > 0  # the first of several processes prints
    return Console(
        stderr=stderr, width=width, markup=False, highlight=False, emoji=False, quiet=quiet
    )


def text_width(screen: Console) -> int:
    """Returns the number of columns for running text."""
    return min(screen.width, TEXT_WIDTH)


def counting_bar() -> Progress:
    """Returns a progress bar on stderr, which disappears at the end. In a pipe it shows nothing."""
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
    """Returns the first few names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
