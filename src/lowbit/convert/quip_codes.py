"""Translates the codes of QuIP-for-all and AutoQuIP to codes of the format `lattice`.

| codebook   | dtype | content of one stored number                                               |
| ---------- | ----- | -------------------------------------------------------------------------- |
| E8P12      | int16 | one code                                                                   |
| E8P12RVQ3B | int32 | 4 of 12 bytes with 4 codes: each 1 byte E8, then 2 E8P12, low byte first   |
| E8P12RVQ4B | int32 | low half: the residual's code of E8P12; high half: the first stage's code  |
| D4         | uint8 | one code                                                                   |
| HI         | int32 | eight codes; element NIBBLES[i] in bits 4 i to 4 i + 3                     |

Both have the codewords of QuIP# (arXiv 2402.04396, section 4; see `formats/lattice`) and number
them differently. `e8p_words`, `e8_words` and `d4_words` list the codewords in the order that
QuIP-for-all and AutoQuIP use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.lattice import e8p
from lowbit.formats.lattice.tables import table

# For E8P12: the bit of the code that holds the sign of each coordinate, and the coordinates that
# are 1/2 in the 29 patterns of squared norm 12, which come last (the other five are 3/2).
SIGN_BITS = (7, 5, 6, 4, 3, 1, 2, 0)
TRIPLES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 "
    "245 167 157 147 156 146 045 067 057 047 056 046 014 237"
).split()
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Layout:
    """How codes are stored: `count` numbers of `dtype` together hold `weights` weights."""

    dtype: torch.dtype
    count: int
    weights: int


LAYOUTS = {
    "E8P12": Layout(torch.int16, 1, 8),
    "E8P12RVQ3B": Layout(torch.int32, 3, 32),
    "E8P12RVQ4B": Layout(torch.int32, 1, 8),
    "D4": Layout(torch.uint8, 1, 4),
    "HI": Layout(torch.int32, 1, 8),
}


def our_codes(codebook: str, stored: Tensor) -> Tensor:
    """Translates stored codes to codes of the format `lattice`.

    codebook: a key of LAYOUTS.
    stored: (out, numbers), of the codebook's dtype in LAYOUTS.

    Returns (out, blocks), of the code_dtype of lowbit's codebook of the same name.
    """
    if codebook == "HI":
        nibbles = stored.unsqueeze(-1) >> torch.arange(0, 32, 4) & 15
        return nibbles[..., torch.tensor(NIBBLES).argsort()].flatten(1).to(torch.uint8)
    if codebook == "D4":
        return translation("D4")[stored.int()].to(torch.uint8)
    first = translation("E8P12")
    if codebook == "E8P12":
        return first[stored.int() & 0xFFFF]
    if codebook == "E8P12RVQ3B":
        residual, low, high = (
            stored.contiguous().view(torch.uint8).unflatten(-1, (-1, 3)).unbind(-1)
        )
        return first[low.int() | high.int() << 8] | translation("E8")[residual.int()] << 16
    residual = first[stored & 0xFFFF].long() << 16
    return first[stored >> 16 & 0xFFFF] | residual


@lru_cache
def translation(name: str) -> Tensor:
    """Returns lowbit's code for each QuIP code of a table: (codewords,) int32.

    name: "E8P12", "E8" or "D4".
    """
    theirs, ours = _keys(WORDS[name]()), _keys(table(name, torch.device("cpu")))
    ordered, codes = ours.sort()
    position = torch.searchsorted(ordered, theirs).clamp(max=len(ours) - 1)
    assert torch.equal(ordered[position], theirs)
    return codes[position].int()


def _keys(words: Tensor) -> Tensor:
    """One int64 per codeword: each of up to 8 coordinates, times 4, is an integer of one byte."""
    quarters = functional.pad(words * 4, (0, 8 - words.shape[1])).to(torch.int8)
    return quarters.contiguous().view(torch.int64).squeeze(1)


def e8p_words() -> Tensor:
    """The codewords of E8P12 in the order of their codes: (65536, 8) float32"""
    levels = e8p.patterns()
    ball = levels[(levels + 0.5).square().sum(1) <= 10]  # these are in lexicographic order
    halves = [[int(str(i) not in triple) for i in range(8)] for triple in TRIPLES]
    sizes = torch.cat([ball, torch.tensor(halves, dtype=torch.uint8)]) + 0.5
    code = torch.arange(2**16)
    odd = (code.unsqueeze(-1) >> torch.arange(8) & 1).sum(-1) % 2
    minus = ((code & 255) ^ odd).unsqueeze(-1) >> torch.tensor(SIGN_BITS) & 1
    minus[:, 7] ^= (sizes.sum(1) % 2).long()[code >> 8]
    return sizes[code >> 8] * (1 - 2 * minus) + (0.25 - odd / 2).unsqueeze(-1)


def e8_words() -> Tensor:
    """The codewords of E8 in the order of their codes: (256, 8) float32"""
    whole = [p for p in product((-1.0, 0.0, 1.0), repeat=8) if sum(map(abs, p)) in (0, 2)]
    halves = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    twos = 2 * torch.eye(8)
    return torch.cat([torch.tensor(whole), torch.tensor(halves), twos, -twos[:-1]])


def d4_words() -> Tensor:
    """The codewords of D4 in the order of their codes: (256, 4) float32"""
    code = torch.arange(256)
    sizes = torch.tensor([_d4_sizes(pattern) for pattern in range(32)])[code & 31]
    minus = torch.zeros(256, 4, dtype=torch.int64)
    minus[:, 2], minus[:, 1] = code >> 5 & 1, code >> 6 & 1
    minus[:, 3] = ((sizes * (1 - 2 * minus)).sum(1) % 2).long()
    return sizes * (1 - 2 * (minus ^ (code >> 7).unsqueeze(-1)))


def _d4_sizes(pattern: int) -> list[float]:
    """The four magnitudes of a pattern, which is the lower 5 bits of a code."""
    position = pattern & 3
    if pattern < 2:
        return [0.5 + pattern] * 4
    if pattern < 8:
        pair = 1.5 if pattern & 1 else 0.5
        return [pair if i in (0, pattern >> 1) else 2 - pair for i in range(4)]
    if pattern < 16:
        alone = 1.5 if pattern < 12 else 0.5
        return [alone if i == position else 2 - alone for i in range(4)]
    sizes = [0.5] * 4
    if pattern < 20:
        sizes[position] = 2.5
        return sizes
    others = [i for i in range(4) if i != position]
    sizes[position], sizes[others[(pattern - 20) >> 2]] = 1.5, 2.5
    return sizes


WORDS: dict[str, Callable[[], Tensor]] = {
    "E8P12": e8p_words,
    "E8": e8_words,
    "D4": d4_words,
}
