"""Reads what exporters wrote, with numpy and without the code that packs.

Each target decodes its own files again after writing. These functions share no line with
`kernels/bits.py`, so that an error in packing cannot hide itself.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def stream_codes(words: Tensor, bits: int, count: int) -> Array:
    """Reads little-endian streams of codes.

    words: (rows, n) of any integer dtype; each row is one stream of bytes.
    bits: width of a code, 1 to 8.
    count: codes of a row.

    Returns (rows, count) int64.
    """
    rows = words.shape[0]
    stored = np.ascontiguousarray(words.numpy()).view(np.uint8).reshape(rows, -1)
    ones = np.unpackbits(stored, axis=1, bitorder="little")[:, : count * bits]
    values = ones.reshape(rows, count, bits).astype(np.int64)
    return (values << np.arange(bits)).sum(axis=2)


def by_column(numbers: Array, columns: int) -> Array:
    """Repeats numbers of equal groups (rows, groups) for each column: (rows, columns)."""
    return np.repeat(numbers, -(-columns // numbers.shape[1]), axis=1)[:, :columns]
