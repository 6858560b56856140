"""Opens the files of a folder with numpy alone: tensors of a shard, and packed numbers."""

import json

import numpy as np

DTYPES = {"U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "F16": "<f2", "F32": "<f4"}


def tensors(shard: bytes) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file by name; bfloat16 becomes float32."""
    length = int.from_bytes(shard[:8], "little")
    header, data = json.loads(shard[8 : 8 + length]), shard[8 + length :]
    header.pop("__metadata__", None)
    found = {}
    for name, info in header.items():
        part = data[slice(*info["data_offsets"])]
        if info["dtype"] == "BF16":  # the upper half of a float32
            values = (np.frombuffer(part, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(part, DTYPES[info["dtype"]])
        found[name] = values.reshape(info["shape"])
    return found


def unpack(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """Returns `count` numbers of `width` bits of each row: (rows, bytes) -> (rows, count)."""
    bits = np.unpackbits(packed, axis=-1, count=count * width, bitorder="little")
    return bits.reshape(*packed.shape[:-1], count, width) @ (1 << np.arange(width))
