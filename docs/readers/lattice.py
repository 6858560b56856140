"""Reads a layer of the format lattice."""

import numpy as np
from readers.codebooks import words
from readers.files import unpack
from readers.rotation import restored

CODES = {"E8P12": (8, 16), "E8P12RVQ3B": (8, 24), "E8P12RVQ4B": (8, 32), "D4": (4, 8), "HI": (1, 4)}


def weight(entry: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the weight (out, in) float32 of an entry of config.json and the layer's tensors.

    `sign_in` and `factor_in` of a layer with `shares` are those of the other layer.
    """
    rows, columns = entry["shape"]
    dim, bits = CODES[entry["codebook"]]  # weights of a word, bits of its code
    codes = unpack(tensors["packed"], bits, -(-columns // dim))
    found = words(codes, entry["codebook"], entry["residual_scale"]).reshape(rows, -1)
    rotated = tensors["scale"].astype(float)[:, None] * found[:, :columns]
    return restored(rotated, entry, tensors)
