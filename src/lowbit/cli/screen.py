"""Where commands write."""

import sys

from rich.console import Console

from lowbit.quantities import change, duration, size

__all__ = ["change", "console", "duration", "shortened", "size"]

PLAIN_WIDTH = 200  # columns of a file or a pipe: tables are not folded there


def console(stderr: bool = False) -> Console:
    """stdout, or stderr. Text is taken as it is: paths may hold what looks like markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def shortened(names: list[str], most: int = 3) -> str:
    """The first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
