"""Opens files that torch.save wrote, which are pickles. No other part of lowbit opens one.

torch.load is called with weights_only=True, so that no code in a pickle can run.
"""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.reader import DTYPES, refuse_pointer
from lowbit.parsing import kind_of, shorten

GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # how torch names a class or function in a pickle
KINDS = {dict: "a dictionary", list: "a list", int: "a whole number", float: "a number"}
SAVE = "save model.state_dict() alone with torch.save, or the model with save_pretrained"


def read_pickled(path: Path) -> Any:
    """Returns what a file holds: tensors, numbers, texts, and lists and dictionaries of them.

    Raises ValueError if it holds anything else, is damaged, or is no regular file.
    """
    if path.exists() and not path.is_file():  # reading a named pipe would never end
        raise ValueError(f"{path} is {kind_of(path.stat().st_mode)}, but must be a file")
    try:
        zipped = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about its own classes
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # bytes that are no pickle make torch raise nearly anything
        refuse_pointer(path)
        named = GLOBAL.search(str(error))
        raise ValueError(
            f"{path} holds more than tensors, or is damaged: "
            + (f"it names {shorten(named[1])}, which is no tensor" if named else "torch refuses it")
            + f". Copy it again from its source, or {SAVE}"
        ) from None


def read_state(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file that holds a model's state_dict, by name.

    Raises ValueError as `read_pickled` does, and for anything that safetensors cannot hold.
    """
    state = read_pickled(path)
    if not isinstance(state, dict) or not state:
        came = "nothing" if state == {} else KINDS.get(type(state), "something else")
        raise ValueError(f"{path} holds {came}, not a dictionary of tensors by name: {SAVE}")
    for name, value in state.items():
        problem = _problem(name, value)
        if problem is not None:
            raise ValueError(f"{path}: {shorten(repr(name))} {problem}: {SAVE}")
    return state


def _problem(name: Any, value: Any) -> str | None:
    """Returns why an entry is no weight of a model, as the rest of a sentence; None if it is."""
    if not isinstance(name, str):
        return "is no text, but must be the name of a tensor"
    if not isinstance(value, Tensor):
        return f"is {KINDS.get(type(value), 'no tensor')}, but must be a tensor"
    if value.is_meta:
        return "is a tensor without values (on the device meta)"
    if value.layout != torch.strided or value.is_quantized or value.dtype not in DTYPES.values():
        kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
        return f"is a tensor that safetensors cannot hold ({kind})"
    return None
