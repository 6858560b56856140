"""Multiplies by a weight that is dequantized a few rows at a time (a tile).

The operating system maps a weight of more than 32 MiB anew on every forward, which costs page
faults. A tile stays in the processor's cache until it is multiplied. With 2048 x 5632 weights of 4
bits and one token, a forward takes 28 to 48 ms with the whole weight and 9 ms with tiles (one CPU
thread).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

# Weights in a tile. On a CPU a tile takes 1 MiB of float32, half of a second-level cache. From
# MANY_TOKENS on, it has LARGER times as many weights (4 MiB): every tile reads all tokens again,
# and that then takes longer than a slower cache for the tile (up to a third of the time). On other
# devices a tile takes 64 MiB, because each tile costs a dozen kernel launches.
WEIGHTS_ON_CPU = 2**18
MANY_TOKENS, LARGER = 16, 4
WEIGHTS_ELSEWHERE = 2**24
ALIGNMENT = 16  # matrix products are faster with tiles whose rows are a multiple of it


def by_rows(
    x: Tensor,
    shape: tuple[int, int],
    product: Callable[..., Tensor],
    sources: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Multiplies x by all rows of a weight, one tile of rows at a time.

    x: (tokens, ...), the tensor that `product` reads. Only its length and device are used here.
    shape: rows and columns of the weight.
    product: a function of an uninitialised tensor (rows of the tile, columns) and of the tile's
        rows of each source. It writes the tile's weights into the first, and returns the products
        (tokens, rows of the tile).
    sources: tensors with one row for each row of the weight.
    dtype: dtype of the tile's weights.

    Returns (tokens, rows).

    If no gradients are recorded, all tiles use the same memory, because freshly allocated memory
    can cost page faults and up to three times as long. They then also run in inference mode,
    because the bookkeeping of views takes a quarter of the time. While torch.compile traces, one
    tile holds all rows: the compiler would unroll dozens of tiles for each layer.
    """
    rows, columns = shape
    compiling = torch.compiler.is_compiling()
    at_once = rows if compiling else min(rows, _rows_at_once(columns, len(x), x.device))
    recorded = compiling or torch.is_grad_enabled()

    def memory() -> Tensor:
        return torch.empty(at_once, columns, dtype=dtype, device=x.device)

    with nullcontext() if recorded else torch.inference_mode():
        shared = None if recorded else memory()
        parts = []
        for tile in zip(*(source.split(at_once) for source in sources), strict=True):
            weight = memory() if shared is None else shared
            parts.append(product(weight[: len(tile[0])], *tile))
    return torch.cat(parts, 1)  # outside of inference mode, for an ordinary tensor


def _rows_at_once(columns: int, tokens: int, device: torch.device) -> int:
    weights = WEIGHTS_ELSEWHERE
    if device.type == "cpu":
        weights = WEIGHTS_ON_CPU * (LARGER if tokens >= MANY_TOKENS else 1)
    count = max(1, weights // columns)
    return count - count % ALIGNMENT if count > ALIGNMENT else count


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which to multiply x: its own, but float32 for half precision on a CPU.

    There float32 is faster.
    """
    return torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype
