"""The definitions of the lattice format's arithmetic, in torch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend
from lowbit.formats.tiles import by_rows

if TYPE_CHECKING:
    from lowbit.formats.lattice import LatticeLinear

# Words at a time, and products at a time: on a CPU 1 MiB, which stays in the second-level cache;
# elsewhere 1 GiB.
TILE = 2**10
PRODUCTS_ON_CPU = 2**18
PRODUCTS_ELSEWHERE = 2**28


class Reference(Backend["LatticeLinear"]):
    """Multiplies the rotated input by the words of some rows at a time, and rotates the result.

    The words are multiplied by the scale, not the product, so that half precision has to hold
    nothing larger than the result.
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
        y = y if y.dtype == torch.float64 else y.float()
        return layer.rotation_out.undo(y, layer.sign_out, layer.factor_out)


def nearest(x: Tensor, words: Tensor) -> Tensor:
    """The row of the nearest word, by trying all; of several equally near ones the first.

    x: (..., dim)  words: (count, dim) float32  ->  (...) int64
    """
    flat = x.detach().float().reshape(-1, words.shape[1])
    products = PRODUCTS_ON_CPU if x.device.type == "cpu" else PRODUCTS_ELSEWHERE
    parts = flat.split(products // min(TILE, len(words)))
    found = [_nearest(part.T, words) for part in parts]
    return torch.cat(found).view(x.shape[:-1])


def _nearest(x: Tensor, words: Tensor) -> Tensor:
    """x: (dim, n)  ->  (n,) int64"""
    best = x.new_full((x.shape[1],), -torch.inf)
    found = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, len(words), TILE):
        tile = words[start : start + TILE]
        # |x - word|^2 is least where 2 word.x - |word|^2 is largest.
        score = torch.addmm(-tile.square().sum(1, keepdim=True), tile, x, alpha=2)
        most = score.amax(0)
        # The first row where nothing is missing; with floats alone, it is found in a fifth of the
        # time that torch.argmax or a comparison takes on a CPU (1024 x 256, one thread).
        numbers = torch.arange(len(tile), dtype=torch.float32, device=x.device)
        missing = (most - score).sign_().mul_(len(tile)).add_(numbers[:, None])
        place = missing.amin(0).long().clamp(0, len(tile) - 1)
        found = torch.where(most > best, start + place, found)
        best = torch.maximum(best, most)
    return found
