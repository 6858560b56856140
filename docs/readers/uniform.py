"""Reads a layer of the format uniform."""

import numpy as np
from readers.files import unpack
from readers.rotation import drawn_signs, transform


def weight(entry: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the weight (out, in) float32 of an entry of config.json and the layer's tensors."""
    (rows, columns), bits, shift = entry["shape"], entry["bits"], entry["zero_shift"]
    codes = unpack(tensors["packed"], bits, columns)
    if entry["symmetric"]:
        zero = np.full((rows, 1), 2 ** (bits - 1)).repeat(tensors["scale"].shape[1], 1)
    else:
        zero = unpack(tensors["zero"], bits + shift, rows).T / 2**shift
    group = np.arange(columns) // (entry["group_size"] or columns)  # of each column
    scale = tensors["scale"].astype(np.float32)
    weight = scale[:, group] * (codes - zero[:, group]).astype(np.float32)
    if rotation := entry.get("rotation"):
        signs = drawn_signs(columns, rotation["seed"])
        weight = (weight @ transform(columns, rotation["kind"]).T * signs).astype(np.float32)
    return weight
