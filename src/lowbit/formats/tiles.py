"""Products with a weight that is made from its codes a few rows at a time.

A weight of more than 32 MiB is mapped by the operating system and page-faulted anew on each
forward; a tile of it stays in a processor's cache until it is multiplied. 2048 x 5632 weights of 4
bits and one token take 28 to 48 ms whole and 9 ms in tiles (one CPU thread).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

# Weights in a tile: on a CPU 1 MiB of float32, half of a second-level cache. From MANY tokens on,
# TIMES as many (4 MiB): reading the tokens again for each tile then takes longer than fetching the
# tile from further away, up to a third of the time. Elsewhere 64 MiB, because each tile costs a
# dozen kernel launches.
WEIGHTS_ON_CPU = 2**18
MANY, TIMES = 16, 4
WEIGHTS_ELSEWHERE = 2**24
ALIGNMENT = 16  # matrix products like tiles whose rows are a multiple of it


def by_rows(
    x: Tensor,
    shape: tuple[int, int],
    product: Callable[..., Tensor],
    sources: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The products of x with all rows of a weight, some rows at a time: (tokens, rows).

    x: (tokens, ...), which `product` reads; it says how many tokens there are and on which device.
    shape: rows and columns of the weight.
    product: takes an uninitialised tensor (some rows, columns), into which it writes this part of
        the weight, and the same rows of each source; returns (tokens, these rows).
    sources: tensors with a row for each row of the weight.
    dtype: of the part of the weight.

    Where no gradients are recorded, all parts have the same memory (freshly allocated ones are
    page-faulted as the allocator pleases, which takes up to three times as long) and run in
    inference mode (the bookkeeping of views takes a quarter of the time). While torch.compile
    traces, all rows come at once: it would unroll the tiles, dozens for each layer.
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
    return torch.cat(parts, 1)  # outside of inference mode: an ordinary tensor


def _rows_at_once(columns: int, tokens: int, device: torch.device) -> int:
    weights = WEIGHTS_ELSEWHERE
    if device.type == "cpu":
        weights = WEIGHTS_ON_CPU * (TIMES if tokens >= MANY else 1)
    count = max(1, weights // columns)
    return count - count % ALIGNMENT if count > ALIGNMENT else count


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply x in: that of x, but float32 for half precision on a CPU, where it is
    faster."""
    return torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype
