"""Reads a layer of the format dense."""

import numpy as np


def weight(entry: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the weight (out, in) float32 of an entry of config.json and the layer's tensors."""
    return tensors["values"].astype(np.float32)
