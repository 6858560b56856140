"""The blocks of llama.cpp that can hold a grid: 32 codes of a row with their scale.

| block | bytes in order                                             | weight         |
| ----- | ---------------------------------------------------------- | -------------- |
| Q4_0  | d float16; 16 bytes of nibbles                             | d * (q - 8)    |
| Q4_1  | d, m float16; 16 bytes of nibbles                          | d * q + m      |
| Q5_0  | d float16; uint32 of fifth bits; 16 bytes of nibbles       | d * (q - 16)   |
| Q5_1  | d, m float16; uint32 of fifth bits; 16 bytes of nibbles    | d * q + m      |
| Q8_0  | d float16; 32 int8                                         | d * q          |

Byte j of the nibbles holds element j in its low half and element j + 16 in its high half. Bit j of
the uint32 is the fifth bit of element j.

Source: github.com/ggml-org/llama.cpp, ggml-common.h.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit.exporters.grid import Grid, Refused, regrouped, widened

BLOCK = 32  # elements
SYMMETRIC = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
ASYMMETRIC = {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1"}
CODE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}


def block_type(grid: Grid) -> str | None:
    """Returns the block that holds a grid; None: there is none."""
    return (SYMMETRIC if grid.symmetric else ASYMMETRIC).get(grid.bits)


def fits_blocks(grid: Grid) -> bool:
    """Returns whether rows and groups of a grid are whole blocks."""
    return grid.in_features % BLOCK == 0 and (grid.per_row or grid.group_size % BLOCK == 0)


def encode(grid: Grid, kind: str) -> Tensor:
    """Returns the blocks of a grid: (out, bytes of a row) uint8. kind: as `block_type` returns"""
    bits = CODE_BITS[kind]
    grid = regrouped(grid, BLOCK)
    if grid.symmetric:
        grid = widened(grid, bits)
    codes = grid.codes.unflatten(1, (-1, BLOCK)).numpy()
    parts: list[NDArray[Any]] = [_halves(grid.scale.float(), "scales")]
    if kind.endswith("_1"):
        minimum = -grid.scale.float() * grid.zero.float() * 2.0**-grid.zero_shift
        parts.append(_halves(minimum, "minima"))
    if bits == 8:
        parts.append((codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8))
    else:
        if bits == 5:
            fifth = np.packbits(codes >> 4 & 1, axis=2, bitorder="little")
            parts.append(fifth)
        low = codes & 15
        parts.append(low[..., :16] | low[..., 16:] << 4)
    whole = np.concatenate(parts, axis=2)
    return torch.from_numpy(np.ascontiguousarray(whole.reshape(len(whole), -1)))


def _halves(numbers: Tensor, what: str) -> NDArray[Any]:
    """Returns numbers of blocks (out, blocks) as the bytes of float16: (out, blocks, 2)."""
    half = numbers.half()
    if bool(torch.isinf(half).any()):
        raise Refused(f"its {what} are beyond float16, which blocks store: export to ct")
    return half.numpy().view(np.uint8).reshape(*numbers.shape, 2)
