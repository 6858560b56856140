"""Reads a layer of the format sorted_group."""

import numpy as np
from readers.files import unpack


def weight(entry: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the weight (out, in) float32 of an entry of config.json and the layer's tensors.

    The permutation of a layer with `shares` is that of the other layer.
    """
    columns, bits = entry["shape"][1], entry["bits"]
    kept = columns - entry["salient"]
    codes = unpack(tensors["packed"], bits, kept) - 2 ** (bits - 1)
    group = np.arange(kept) // (entry["group_size"] or kept)
    ordered = tensors["scale"].astype(np.float32)[:, group] * codes.astype(np.float32)
    if entry["salient"]:
        salient = tensors["salient"].astype(np.float32)
        if entry["salient_dtype"] == "int8":
            salient *= tensors["salient_scale"].astype(np.float32)[:, None]
        ordered = np.concatenate([ordered, salient], 1)
    if entry["permutation"] is None:
        return ordered
    whole = np.empty_like(ordered)
    whole[:, tensors["permutation"].astype(int)] = ordered
    return whole
