"""Keep transformers and the hub from talking over our own output; for programs, never at import."""

from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


def quiet(downloads: bool = True) -> None:
    """Errors only, and no bars while weights load. downloads: the hub's bars too."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    if downloads:
        disable_progress_bars()
