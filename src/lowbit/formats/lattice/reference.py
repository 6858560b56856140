"""The reference of the lattice format: its arithmetic in plain torch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend
from lowbit.formats.tiles import by_rows

if TYPE_CHECKING:
    from lowbit.formats.lattice import LatticeLinear

# Limits of a step of `nearest`: words of the codebook, and products of vectors with words. On a CPU
# the products take 1 MiB, which stays in the second-level cache; on other devices 1 GiB.
TILE = 2**10
PRODUCTS_ON_CPU = 2**18
PRODUCTS_ELSEWHERE = 2**28


class Reference(Backend["LatticeLinear"]):
    """Multiplies the rotated input by the words of a few rows at a time, and rotates the result.

    The scale is multiplied into the words and not into the product, so that half precision does not
    have to hold numbers larger than the result.
    """

    name = "reference"

    def multiply(
        self, layer: "LatticeLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        book, rows, columns = layer.codebook, layer.out_features, layer.in_features
        blocks = book.blocks(columns)
        unit = (layer.scale.float() * book.unit).expand(rows).unsqueeze(1)

        def product(words: Tensor, packed: Tensor, unit: Tensor) -> Tensor:
            codes = book.unpack(packed, blocks)
            book.write(codes, words.view(*codes.shape, book.dim))
            weight = words.mul_(unit)[:, :columns]
            return functional.linear(prepared, weight.to(prepared.dtype))

        y = by_rows(prepared, (rows, blocks * book.dim), product, (layer.packed, unit))
        return layer.finish(y)


def nearest(x: Tensor, words: Tensor) -> Tensor:
    """Returns the index of the nearest word of each vector by trying all; of equal ones the first.

    x: (..., dim).
    words: (count, dim) float32.

    Returns (...) int64.
    """
    flat = x.detach().float().reshape(-1, words.shape[1])
    products = PRODUCTS_ON_CPU if x.device.type == "cpu" else PRODUCTS_ELSEWHERE
    parts = flat.split(products // min(TILE, len(words)))
    indices = [_nearest(part.T, words) for part in parts]
    return torch.cat(indices).view(x.shape[:-1])


def _nearest(x: Tensor, words: Tensor) -> Tensor:
    """Finds the nearest words of transposed vectors. x: (dim, n) -> (n,) int64"""
    best = x.new_full((x.shape[1],), -torch.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, len(words), TILE):
        tile = words[start : start + TILE]
        # |x - word|^2 is least where 2 word.x - |word|^2 is largest.
        score = torch.addmm(-tile.square().sum(1, keepdim=True), tile, x, alpha=2)
        most = score.amax(0)
        # The smallest row number among those with the highest score. Floats alone find it in a
        # fifth of the time of torch.argmax or a comparison on a CPU (1024 x 256, one thread).
        numbers = torch.arange(len(tile), dtype=torch.float32, device=x.device)
        candidates = (most - score).sign_().mul_(len(tile)).add_(numbers[:, None])
        row = candidates.amin(0).long().clamp(0, len(tile) - 1)
        index = torch.where(most > best, start + row, index)
        best = torch.maximum(best, most)
    return index
