"""Writes and reads tensor-cache.json and params_shard_N.bin, TVM's files of tensors.

A shard holds tensors one after the other, row by row, little-endian, without gaps.
tensor-cache.json lists for each shard its file, size and md5, and name, shape, dtype and place of
its tensors.
"""

import hashlib
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.checkpoint.reader import read_json
from lowbit.checkpoint.writer import write_json

INDEX = "tensor-cache.json"
SHARD_BYTES = 32 * 2**20  # a larger tensor has a shard of its own, as in MLC's own folders
NUMPY = {"float16": np.float16, "uint32": np.uint32}


def write_cache(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes tensors in the order given. Each shard is written as soon as it is full."""
    shards: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    data = bytearray()

    def flush() -> None:
        if not records:
            return
        name = f"params_shard_{len(shards)}.bin"
        (folder / name).write_bytes(data)
        # TVM compares the md5 of what it downloads; nothing here depends on its strength.
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        shard = {"dataPath": name, "format": "raw-shard", "nbytes": len(data)}
        shards.append({**shard, "records": list(records), "md5sum": digest})
        records.clear()
        data.clear()

    for name, tensor in tensors:
        content = tensor.contiguous().numpy().tobytes()
        if len(data) + len(content) > SHARD_BYTES:
            flush()
        records.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "format": "raw",
                "nbytes": len(content),
                "byteOffset": len(data),
            }
        )
        data += content
    flush()
    write_json(folder / INDEX, {"metadata": _totals(shards), "records": shards})


def _totals(shards: list[dict[str, Any]]) -> dict[str, Any]:
    every = [record for shard in shards for record in shard["records"]]
    size = float(sum(record["nbytes"] for record in every))
    weights = sum(
        prod(record["shape"]) * (8 if record["dtype"] == "uint32" else 1)
        for record in every
        if not record["name"].endswith(".q_scale")
    )
    return {"ParamSize": len(every), "ParamBytes": size, "BitsPerParam": 8 * size / weights}


class CacheReader:
    """Reads tensors by name.

    folder: the folder of tensor-cache.json.
    records: attribute, file and record of every tensor, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, tuple[str, dict[str, Any]]] = {
            record["name"]: (shard["dataPath"], record)
            for shard in read_json(folder / INDEX)["records"]
            for record in shard["records"]
        }

    def read(self, name: str) -> Tensor:
        file, record = self.records[name]
        dtype = np.dtype(NUMPY[record["dtype"]])
        stored = np.fromfile(
            self.folder / file,
            dtype=dtype,
            count=record["nbytes"] // dtype.itemsize,
            offset=record["byteOffset"],
        )
        return torch.from_numpy(stored.reshape(record["shape"]))
