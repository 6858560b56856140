"""Says in words that the code of a model fails, as for sizes in config.json that do not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import OutOfMemoryError, Tensor, nn

from lowbit.parsing import reason_of

PACKAGE = __name__.partition(".")[0]


@contextmanager
def forward_pass(model: nn.Module, tokens: Tensor, folder: object = None) -> Iterator[None]:
    """Context manager in which a whole model is run.

    tokens: what it is run on.
    folder: its folder, for the message; None: the one that it was loaded from.

    Raises ValueError, with the folder, for every error that is not one of lowbit's own.
    """
    try:
        yield
    except (MemoryError, OutOfMemoryError):
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        place = folder or getattr(getattr(model, "config", None), "_name_or_path", "") or "model"
        raise ValueError(
            f"{place}: the forward pass of {type(model).__name__} in transformers fails on "
            f"{tokens.numel()} tokens ({reason_of(error)}): check the sizes in config.json"
        ) from error


def _is_ours(error: BaseException) -> bool:
    """Whether code of lowbit raised an error: its message is a sentence already."""
    raised_in = error.__traceback__
    while raised_in is not None and raised_in.tb_next is not None:
        raised_in = raised_in.tb_next
    name = "" if raised_in is None else str(raised_in.tb_frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] == PACKAGE
