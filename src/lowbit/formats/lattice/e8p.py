"""The 65536 words of E8P12: QuIP# (arXiv 2402.04396), section 4; the order of the codes is ours.

A word has eight coordinates. Their magnitudes, before a shift, are one of 256 patterns of 1/2, 3/2
and 5/2: the 227 whose squared norm is at most 10, and those 29 of squared norm 12 whose three
halves stand at TRIPLES. Patterns are numbered from 0, in lexicographic order of their magnitudes.
The number of minus signs is even where the magnitudes sum up to an even number, and odd where they
sum up to an odd one. Last, 1/4 is added to all eight coordinates or taken from them. The 16 bits of
a code:

| bits    | hold                                                                               |
| ------- | ---------------------------------------------------------------------------------- |
| 0 to 6  | bit i is 1 where coordinate i has a minus sign; that of coordinate 7 follows        |
| 7       | 0 where 1/4 is added, 1 where it is taken away                                     |
| 8 to 15 | the number of the pattern                                                          |

So code 0 is (1/2, ..., 1/2) + 1/4: all words lie in the lattice E8 shifted by 1/4.
"""

from itertools import product

import torch
from torch import Tensor

DIM = 8
SHIFT = 0.25

# Where the three halves stand; the other five magnitudes are 3/2. Any 29 of the 56 such patterns
# are as good; these are QuIP#'s, so that its checkpoints can be converted.
TRIPLES = tuple(
    tuple(int(place) for place in triple)
    for triple in (
        "012 013 014 023 045 046 047 056 057 067 123 146 147 156 157 "
        "167 237 245 246 247 256 257 267 345 346 347 356 357 367"
    ).split()
)


def patterns() -> Tensor:
    """The 256 patterns of magnitudes in their order, less 1/2: (256, 8) uint8 of 0, 1 and 2."""
    triples = {tuple(int(i not in triple) for i in range(DIM)) for triple in TRIPLES}
    # Four times the squared norm: 1, 9 and 25 for the magnitudes 1/2, 3/2 and 5/2.
    ball = {p for p in product(range(3), repeat=DIM) if sum((1, 9, 25)[k] for k in p) <= 40}
    return torch.tensor(sorted(ball | triples), dtype=torch.uint8)


def words() -> Tensor:
    """What each code stands for: (65536, 8) float32"""
    code = torch.arange(2**16)
    levels = patterns()[code >> 8]
    minus = code.unsqueeze(-1) >> torch.arange(DIM - 1) & 1
    last = (minus.sum(-1) + levels.sum(-1)) % 2  # eight halves sum up to 4, an even number
    signs = 1 - 2 * torch.cat([minus, last.unsqueeze(-1)], -1)
    shift = SHIFT * (1 - 2 * (code >> 7 & 1))
    return (levels + 0.5) * signs + shift.unsqueeze(-1)
