"""Reads a table of the format embedding."""

import numpy as np
from readers.files import unpack


def weight(entry: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the table (rows, in) float32 of an entry of config.json and its tensors."""
    columns, bits = entry["shape"][1], entry["bits"]
    codes = unpack(tensors["packed"], bits, columns) - 2 ** (bits - 1)
    group = np.arange(columns) // (entry["group_size"] or columns)
    return tensors["scale"].astype(np.float32)[:, group] * codes.astype(np.float32)
