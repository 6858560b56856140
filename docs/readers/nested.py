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
    own = entry.get("own_grids", [])  # the widths that have a grid of their own
    if bits in own:
        mine = {
            n: tensors[f"slice_{n}"][own.index(bits)] for n in ("scale", "zero") if n in tensors
        }
        tensors = tensors | mine
    scale = tensors["scale"].astype(np.float32)
    zero = np.full(scale.shape, 128) if entry["symmetric"] else tensors["zero"].T.astype(int)
    group = np.arange(columns) // (entry["group_size"] or columns)
    return scale[:, group] * (step * sliced - zero[:, group]).astype(np.float32)
