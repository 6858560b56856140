"""Opens files that torch.save wrote, which are pickles. No other part of lowbit opens one.

torch.load is called with weights_only=True, so that no code in a pickle can run.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.reader import refuse_pointer


def read_pickled(path: Path) -> Any:
    """Returns what a file holds: tensors, numbers, texts, and lists and dictionaries of them.

    Raises ValueError if it holds anything else, or is damaged.
    """
    try:
        zipped = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # bytes that are no pickle make torch raise nearly anything
        refuse_pointer(path)
        reason = str(error).strip().partition("\n")[0] or "it ends too early"
        raise ValueError(f"{path} holds more than tensors, or is damaged: {reason}") from None
