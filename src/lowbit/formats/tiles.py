"""Products with a weight that is made from its codes a few rows at a time.

A weight of more than 32 MiB is mapped by the operating system and page-faulted anew on each
forward; a tile of it stays in a processor's cache until it is multiplied. 2048 x 5632 weights of 4
bits and one token take 28 to 48 ms whole and 8 ms in tiles (one CPU thread).
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Weights in a tile: on a CPU 1 MiB of float32, half of a second-level cache; elsewhere 64 MiB,
# because each tile costs a dozen kernel launches.
WEIGHTS_ON_CPU = 2**18
WEIGHTS_ELSEWHERE = 2**24
ALIGNMENT = 16  # matrix products like tiles whose rows are a multiple of it


def by_rows(
    shape: tuple[int, int],
    device: torch.device,
    product: Callable[[slice, Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The products with all rows of a weight, some rows at a time: (tokens, rows).

    shape: rows and columns of the weight.
    product: takes a slice of the rows and an uninitialised tensor (these rows, columns), into which
        it writes this part of the weight; returns (tokens, these rows).
    dtype: of that tensor.

    Where no gradients are recorded, all tiles have the same memory (freshly allocated ones are
    page-faulted as the allocator pleases, which takes up to three times as long) and run in
    inference mode (the bookkeeping of views takes a quarter of the time).
    """
    rows, columns = shape
    tiles = _tiles(rows, columns, device)

    def memory() -> Tensor:
        return torch.empty(tiles[0].stop, columns, dtype=dtype, device=device)

    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        parts = [product(tile, memory()[: tile.stop - tile.start]) for tile in tiles]
    else:
        with torch.inference_mode():
            shared = memory()
            parts = [product(tile, shared[: tile.stop - tile.start]) for tile in tiles]
    return torch.cat(parts, 1)  # outside of inference mode: an ordinary tensor


def _tiles(rows: int, columns: int, device: torch.device) -> list[slice]:
    weights = WEIGHTS_ON_CPU if device.type == "cpu" else WEIGHTS_ELSEWHERE
    count = max(1, weights // columns)
    if count > ALIGNMENT:
        count = round(weights / columns / ALIGNMENT) * ALIGNMENT
    return [slice(start, min(start + count, rows)) for start in range(0, rows, count)]


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply x in: that of x, but float32 for half precision on a CPU, where it is
    faster."""
    return torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype
