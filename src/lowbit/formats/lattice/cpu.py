"""Multiplies lattice words with the compiled kernels.

Where the processor has byte permutes (AVX-512 VBMI and GFNI), words of E8P12 are packed as they
are. All others become integer codes of 3 or 4 bits a weight. Four times a coordinate of a word is
an integer, one of few. Its number among them is the code:

| words | four times a coordinate    | code       | bits |
| ----- | -------------------------- | ---------- | ---- |
| E8P12 | odd, from -11 to 11        | 0 to 11    | 4    |
| E8    | even, from -8 to 8         | 0 to 8     | 4    |
| D4    | -10, -6, -2, 2, 6, 10      | 0 to 5     | 3    |
| HI    | even, from -30 to 30       | 0 to 15    | 4    |

A layer of two stages takes twice the bits. Integer codes are up to 2.7 times as large as the stored
words; reading them is faster than looking words up in a table in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.formats.lattice.codebooks import E8P12, Codebook, Residual
from lowbit.formats.lattice.e8p import DIM, levels
from lowbit.formats.lattice.tables import look_up
from lowbit.formats.native import rounding
from lowbit.formats.rotated_native import RotatedNative
from lowbit.kernels.native import Part, chosen

if TYPE_CHECKING:
    from lowbit.formats.lattice import LatticeLinear

ZERO_OF_WORDS = 15  # the kernels read a word of E8P12 as codes from 2 to 13; see words.c
HAVE_WORDS = ("vbmi", "amx")  # instruction sets that multiply words as they are stored
WORDS_AT_ONCE = 2**18  # while they are packed


@dataclass(frozen=True)
class Grid:
    """The integers that are four times a coordinate: (code << shift) - zero."""

    zero: int
    shift: int
    bits: int


GRIDS = {"E8P12": Grid(11, 1, 4), "E8": Grid(8, 1, 4), "D4": Grid(10, 2, 3), "HI": Grid(30, 2, 4)}


class Cpu(RotatedNative["LatticeLinear"]):
    """Packs the words of E8P12, or the coordinates of words."""

    def restorable(self, layer: "LatticeLinear") -> dict[str, tuple[int, int, int]]:
        if not _as_words(layer.codebook):
            return {}
        return {"packed": (0, E8P12.code_bits, E8P12.blocks(layer.in_features))}

    def parts(self, layer: "LatticeLinear") -> list[Part]:
        book = layer.codebook
        if not isinstance(book, Residual):
            return [_part(layer, book, 0, 1.0)]
        return [
            _part(layer, E8P12, 0, 1.0),
            _part(layer, book.second, E8P12.code_bits, book.residual_scale),
        ]


def _as_words(book: Codebook) -> bool:
    return book.name == E8P12.name and chosen() in HAVE_WORDS


def _part(layer: "LatticeLinear", book: Codebook, first_bit: int, factor: float) -> Part:
    """Returns a stage, whose code begins at a bit of the layer's codes; factor: of its words."""
    grid, words = GRIDS[book.name], _as_words(book)
    return Part(
        first=0,
        inputs=layer.in_features,
        group_size=layer.in_features,
        codes=_words(layer, first_bit) if words else _coordinates(layer, book, first_bit),
        stream_bits=book.code_bits if words else 8,
        bits=book.code_bits // DIM if words else grid.bits,
        scale=layer.scale.expand(layer.out_features).unsqueeze(1),
        zero=ZERO_OF_WORDS if words else grid.zero,
        shift=grid.shift,
        unit=0.25 * factor,
        rounding=rounding(layer),
        patterns=levels() if words else None,
    )


def _words(layer: "LatticeLinear", first_bit: int) -> Iterator[Tensor]:
    """Yields the 16 bits of each code that begin at a bit: (out, 2 blocks) uint8."""
    blocks = layer.codebook.blocks(layer.in_features)
    code = layer.packed.unflatten(1, (blocks, layer.codebook.code_bits // 8))
    yield code[:, :, first_bit // 8 : first_bit // 8 + 2].flatten(1)


def _coordinates(layer: "LatticeLinear", book: Codebook, first_bit: int) -> Iterator[Tensor]:
    """Yields a few rows of codes at a time: (rows, in) uint8."""
    grid, blocks = GRIDS[book.name], layer.codebook.blocks(layer.in_features)
    for packed in layer.packed.split(max(1, WORDS_AT_ONCE // blocks)):
        codes = layer.codebook.unpack(packed, blocks)
        if book.name != layer.codebook.name:
            codes = codes >> first_bit & 2**book.code_bits - 1
        if book.dim == 1:
            yield codes
            continue
        quarters = look_up(codes, book.name).flatten(1)[:, : layer.in_features]
        yield ((quarters.to(torch.int16) + grid.zero) >> grid.shift).to(torch.uint8).contiguous()
