"""Calls commands of the command line in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from lowbit.cli import app


def call(*arguments: object, code: int = 0, typed: str | None = None) -> Any:
    """Returns exit_code, stdout and stderr of a command, and checks for tracebacks.

    typed: what a user types; None: nothing.
    """
    with _loud_again():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@contextmanager
def _loud_again() -> Iterator[None]:
    """Restores the warnings that commands turn off, since other tests need them."""
    transformers_level, hub_level = (
        transformers_logging.get_verbosity(),
        hub_logging.get_verbosity(),
    )
    try:
        yield
    finally:
        transformers_logging.set_verbosity(transformers_level)
        transformers_logging.enable_progress_bar()
        hub_logging.set_verbosity(hub_level)
        enable_progress_bars()
