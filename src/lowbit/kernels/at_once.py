"""How many values are worked on at once where more would take too much memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_divisor: ContextVar[int] = ContextVar("lowbit_at_once", default=1)


def at_once(values: int) -> int:
    """Returns the number of values that are worked on at once.

    values: that number in a run; a miniature of its model (`lowbit.pipeline.scaled`) takes less.
    """
    return max(1, values // _divisor.get())


@contextmanager
def less_at_once(divisor: int) -> Iterator[None]:
    """Divides what `at_once` returns, so that a model with smaller matrices works in as many parts.

    divisor: by how much its matrices are smaller.
    """
    token = _divisor.set(divisor)
    try:
        yield
    finally:
        _divisor.reset(token)
