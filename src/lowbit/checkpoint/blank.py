"""Writes shards that have the names and shapes of tensors, and zeros that take no disk.

`lowbit plan` reads them where there is a config.json and no weights.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from lowbit.checkpoint.reader import DTYPES, INDEX

SHARD = 2**31  # bytes of a shard at most: a reader maps each of them into memory as a whole
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_blank(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Writes shards of zeros and their index. Most file systems store none of the zeros.

    shapes: the shape of each tensor by name.
    dtype: the dtype of all of them.

    Raises ValueError if the file system takes no files of that size.
    """
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = dtype.itemsize * prod(shape)
        if shards[-1] and held + size > SHARD:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    placed: dict[str, str] = {}
    for number, of_shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / file, of_shard, dtype)
        placed |= dict.fromkeys(of_shard, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    except OSError as error:
        raise ValueError(
            f"{path.parent} takes no file of {end:,} bytes ({error.strerror}), although nearly all "
            "of it would be a hole: set TMPDIR to a folder on another file system"
        ) from error
