"""Reads a layer of the format nested."""

import numpy as np
from readers.files import unpack


def weight(entry: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the weight (out, in) float32 of an entry of config.json and the layer's tensors."""
    columns, bits = entry["shape"][1], entry["bits"]
    step = 2 ** (8 - bits)
    if entry["resident"] == "master":
        top = 2**bits - (not entry["extra_precision"] or bits == 8)
        sliced = np.minimum((tensors["master"].astype(int) + step // 2) // step, top)
    else:
        sliced = unpack(tensors["packed"], bits, columns)
        if "overflow" in tensors:  # a bit for each code that is the largest
            largest = sliced == 2**bits - 1
            sliced[largest] += unpack(tensors["overflow"], 1, entry["top_codes"])
    scale, zero = tensors["scale"], tensors.get("zero")
    if bits in entry.get("own_grids", []):  # this width has a grid of its own
        at = entry["own_grids"].index(bits)
        scale, zero = (
            tensors["slice_scale"][at],
            None if zero is None else tensors["slice_zero"][at],
        )
    scale = scale.astype(np.float32)
    zero = np.full(scale.shape, 128) if zero is None else zero.T.astype(int)
    group = np.arange(columns) // (entry["group_size"] or columns)
    return scale[:, group] * (step * sliced - zero[:, group]).astype(np.float32)
