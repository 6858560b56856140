"""The 65536 words of the codebook E8P12 of QuIP# (arXiv 2402.04396), section 4.

A word has eight coordinates. Their magnitudes, before a shift, are one of 256 patterns of 1/2, 3/2
and 5/2: the 227 patterns whose squared norm is at most 10, and 29 patterns of squared norm 12,
which have 1/2 at three coordinates that TRIPLES lists, and 3/2 at the others. Patterns are numbered
from 0, in lexicographic order of their magnitudes. The number of minus signs is even if the
magnitudes sum up to an even number, and odd if they sum up to an odd one. Finally, 1/4 is either
added to all eight coordinates or subtracted from all of them. The order of the codes is our own.
The 16 bits of a code:

| bits    | hold                                                                               |
| ------- | ---------------------------------------------------------------------------------- |
| 0 to 6  | bit i is 1 if coordinate i has a minus sign; the parity gives that of coordinate 7 |
| 7       | 0 if 1/4 is added, 1 if it is subtracted                                           |
| 8 to 15 | the number of the pattern                                                          |

So code 0 is (1/2, ..., 1/2) + 1/4: all words lie in the lattice E8 shifted by 1/4.
"""

from itertools import product

import torch
from torch import Tensor

DIM = 8
SHIFT = 0.25

# The three coordinates with magnitude 1/2; the other five have 3/2. Any 29 of the 56 such patterns
# would do. These are QuIP#'s, so that its checkpoints can be converted.
TRIPLES = tuple(
    tuple(int(place) for place in triple)
    for triple in (
        "012 013 014 023 045 046 047 056 057 067 123 146 147 156 157 "
        "167 237 245 246 247 256 257 267 345 346 347 356 357 367"
    ).split()
)


def patterns() -> Tensor:
    """Returns the 256 patterns of magnitudes minus 1/2, in order: (256, 8) uint8 of 0, 1 and 2."""
    triples = {tuple(int(i not in triple) for i in range(DIM)) for triple in TRIPLES}
    # Four times the squared norm: 1, 9 and 25 for the magnitudes 1/2, 3/2 and 5/2.
    ball = {p for p in product(range(3), repeat=DIM) if sum((1, 9, 25)[k] for k in p) <= 40}
    return torch.tensor(sorted(ball | triples), dtype=torch.uint8)


def levels() -> Tensor:
    """Returns the patterns in bytes: (2, 256) uint8.

    The first row holds coordinates 0 to 3, the second 4 to 7, in two bits each, the first lowest.
    """
    four = patterns().unflatten(1, (2, 4)) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    return four.sum(2, dtype=torch.uint8).T.contiguous()


def words() -> Tensor:
    """Returns the words of all codes in order: (65536, 8) float32."""
    code = torch.arange(2**16)
    levels = patterns()[code >> 8]
    minus = code.unsqueeze(-1) >> torch.arange(DIM - 1) & 1
    last = (minus.sum(-1) + levels.sum(-1)) % 2  # eight times 1/2 is 4, which is even
    signs = 1 - 2 * torch.cat([minus, last.unsqueeze(-1)], -1)
    shift = SHIFT * (1 - 2 * (code >> 7 & 1))
    return (levels + 0.5) * signs + shift.unsqueeze(-1)
