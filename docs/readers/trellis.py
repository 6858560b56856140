"""Reads a layer of the format trellis."""

import numpy as np
from readers.rotation import restored

MULTIPLIERS = (2406234277, 4075449853)


def weight(entry: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the weight (out, in) float32 of an entry of config.json and the layer's tensors.

    `sign_in` and `factor_in` of a layer with `shares` are those of the other layer.
    """
    (rows, columns), rate, window = entry["shape"], entry["rate"], entry["state_bits"]
    count = 1 if rate == int(rate) else 2  # weights of a step
    shift, steps = int(rate * count), 256 // count
    down, across, _ = tensors["packed"].shape
    bits = np.unpackbits(tensors["packed"], axis=-1, bitorder="little")
    places = (np.arange(steps)[:, None] * shift + np.arange(window)) % bits.shape[-1]
    state = bits[..., places] @ (1 << np.arange(window))
    mixed = np.stack([state * m % 2**32 for m in MULTIPLIERS[:count]], -2)
    values = sum(mixed >> 8 * byte & 63 for byte in range(4)) - 126
    tiles = values.reshape(down, across, 16, 16)  # position p: row p % 16, column p // 16
    whole = tiles.transpose(0, 3, 1, 2).reshape(16 * down, 16 * across)[:rows, :columns]
    return restored(tensors["scale"].astype(float)[:, None] * whole / 32, entry, tensors)
