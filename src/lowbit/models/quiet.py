"""Silences transformers and the hub for the command line; never called on import."""

from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


def quiet(downloads: bool = True) -> None:
    """Shows only errors, and no progress bars while weights load.

    downloads: whether the progress bars of downloads from the hub are hidden too.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    if downloads:
        disable_progress_bars()
