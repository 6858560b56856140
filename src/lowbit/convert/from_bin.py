"""Weights that exist only as pickles to safetensors: the one place where a pickle is opened.

torch.load is called with weights_only=True, which unpickles tensors and nothing else.
"""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoint.folder import write_folder
from lowbit.checkpoint.reader import read_json

BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"


def from_bin(folder: str | Path, out: str | Path, trust_remote_code: bool = False) -> Path:
    """Writes pytorch_model.bin, or its shards, as safetensors, and returns the new folder.

    trust_remote_code: copy the Python code that comes with the model.

    One pickle is in memory at a time. Raises ValueError when there is none, one holds anything but
    tensors, or `out` exists.
    """
    folder, out = Path(folder), Path(out)
    config = read_json(folder / "config.json")
    files = _files(folder)
    write_folder(out, _shards(folder, files), len(files), config, folder, trust_remote_code)
    return out


def _files(folder: Path) -> list[str]:
    if (folder / BIN_INDEX).exists():
        index = read_json(folder / BIN_INDEX)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if isinstance(placed, dict) and all(Path(str(f)).name == f for f in placed.values()):
            return sorted(set(placed.values()))
        raise ValueError(f"{folder / BIN_INDEX}: 'weight_map' must map tensors to files beside it")
    if (folder / BIN_SINGLE).exists():
        return [BIN_SINGLE]
    raise ValueError(f"{folder} has neither {BIN_SINGLE} nor {BIN_INDEX}")


def _shards(folder: Path, files: list[str]) -> Iterator[dict[str, Tensor]]:
    for file in files:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{folder}: shard {file} is missing")
        try:
            zipped = zipfile.is_zipfile(path)  # else of before torch 1.6, which cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path} holds more than tensors, or is damaged: {reason}") from None
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise ValueError(f"{path} is no dictionary of tensors")
        # Cloned: tied tensors share their memory, which safetensors does not write.
        yield {name: tensor.clone().contiguous() for name, tensor in state.items()}
