"""Reads a layer of the format binary."""

import numpy as np
from readers.files import unpack


def weight(entry: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the weight (out, in) float32 of an entry of config.json and the layer's tensors.

    The mask of a layer with `shares` is that of the other layer.
    """
    (rows, columns), salient = entry["shape"], entry["salient"]
    floats = {k: t.astype(np.float32) for k, t in tensors.items() if t.dtype.kind == "f"}
    signs = 1 - 2 * unpack(tensors["sign"], 1, columns - salient).astype(np.float32)
    plain = floats["row_scale"][:, None] * signs
    if entry["row_mean"]:
        plain += floats["row_mean"][:, None]
    if entry["column_scale"]:
        plain *= floats["column_scale"]
    if not salient:
        return plain
    codes = unpack(tensors["salient"], 4, salient)
    zero = unpack(tensors["salient_zero"], 4, rows)
    mask = unpack(tensors["mask"], 1, columns).astype(bool)
    whole = np.empty((rows, columns), np.float32)
    whole[:, ~mask] = plain
    whole[:, mask] = floats["salient_scale"][:, None] * (codes - zero[:, None])
    return whole
