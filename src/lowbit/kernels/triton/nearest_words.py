"""Finds the nearest words of E8P12, as `formats/lattice/search.py` explains it, in one kernel.

Torch needs about 420 small operations for it. Here a program takes some vectors through both shifts
in registers; all 29 patterns of squared norm 12 are tried, instead of where they might win only.
Of two words that are equally near, it may choose another one than torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.launch import ceil_div

VECTORS = 64  # of a program


def nearest_words(x: Tensor, triples: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the codes of the nearest of all words, and of those with +1/4 and with -1/4.

    x: (vectors, 8) float32.
    triples: (29,) int32; bit i is 1 if the pattern has the magnitude 1/2 at coordinate i.
    number: (6561,) int32, the number of a pattern by its magnitudes minus 1/2, read as digits to
        the base 3.

    Returns three tensors (vectors,) int32.
    """
    x = x.contiguous()
    codes = torch.empty(3, len(x), dtype=torch.int32, device=x.device)
    if len(x):
        grid = (ceil_div(len(x), VECTORS),)
        _nearest[grid](x, triples, number, codes, len(x), TRIPLES=len(triples), VECTORS=VECTORS)
    nearest, plus, minus = codes
    return nearest, plus, minus


@triton.jit
def _ranked(size, rank, place):
    """The size of a rank: (vectors,)"""
    return tl.sum(tl.where(rank == place, size, 0.0), 1)


@triton.jit
def _better(score, choice, other, OTHER: tl.constexpr):
    better = other > score
    return tl.where(better, other, score), tl.where(better, OTHER, choice)


@triton.jit
def _digits(i):
    """Returns 3**(7 - i)."""
    low = tl.where(i == 4, 27, tl.where(i == 5, 9, tl.where(i == 6, 3, 1)))
    high = tl.where(i == 0, 2187, tl.where(i == 1, 729, tl.where(i == 2, 243, 81)))
    return tl.where(i < 4, high, low)


@triton.jit
def _of_shift(x, triples, number, v, vectors, SHIFT: tl.constexpr, TRIPLES: tl.constexpr):
    """The best word of a shift: its score and its code without the bit of the shift."""
    i = tl.arange(0, 8)
    inside = v < vectors
    given = tl.load(x + v[:, None] * 8 + i[None, :], mask=inside[:, None], other=0.0)
    y = given - SHIFT
    size = tl.abs(y)
    across = tl.load(
        x + v[:, None, None] * 8 + i[None, None, :], mask=inside[:, None, None], other=0.0
    )
    across = tl.abs(across - SHIFT)
    larger = across > size[:, :, None]
    earlier = (across == size[:, :, None]) & (i[None, None, :] < i[None, :, None])
    rank = tl.sum((larger | earlier).to(tl.int32), 2)
    odd = tl.sum((y < 0).to(tl.int32), 1) % 2
    flip = 2 * _ranked(size, rank, 7)
    if_even = tl.where(odd == 1, flip, 0.0)  # the loss by a flipped sign where the sum is even
    if_odd = flip - if_even
    total = tl.sum(size, 1)
    base = 2 * SHIFT * tl.sum(given, 1)
    first, second = _ranked(size, rank, 0), _ranked(size, rank, 1)
    none = total + base - 2
    one = none + 2 * first - 2
    two = one + 2 * second - 2
    three = two + 2 * _ranked(size, rank, 2) - 2
    four = three + 2 * _ranked(size, rank, 3) - 2
    large = none + 4 * first - 6
    score, choice = none - if_even, tl.zeros_like(odd)
    score, choice = _better(score, choice, one - if_odd, 1)
    score, choice = _better(score, choice, two - if_even, 2)
    score, choice = _better(score, choice, three - if_odd, 3)
    score, choice = _better(score, choice, four - if_even, 4)
    score, choice = _better(score, choice, large - if_even, 5)
    score, choice = _better(score, choice, large + 2 * second - 2 - if_odd, 6)
    raised = tl.where(choice < 5, choice, choice - 4)
    twice = (choice >= 5).to(tl.int32)
    level = (rank < raised[:, None]).to(tl.int32) + (rank < twice[:, None]).to(tl.int32)
    of_triple = 3 * total + base - 12 - if_odd
    for n in range(0, TRIPLES):
        places = (tl.load(triples + n) >> i) & 1
        other = of_triple - 2 * tl.sum(tl.where(places[None, :] == 1, size, 0.0), 1)
        better = other > score
        score = tl.where(better, other, score)
        level = tl.where(better[:, None], 1 - places[None, :], level)
    minus = (y < 0).to(tl.int32)
    wrong = (odd + tl.sum((level == 1).to(tl.int32), 1)) % 2
    minus = minus ^ (wrong[:, None] & (rank == 7).to(tl.int32))
    key = tl.sum(level * _digits(i)[None, :], 1)
    code = tl.load(number + key) << 8
    code |= tl.sum(tl.where(i[None, :] < 7, minus << i[None, :], 0), 1)
    return score, code


@triton.jit
def _nearest(x, triples, number, codes, vectors, TRIPLES: tl.constexpr, VECTORS: tl.constexpr):
    v = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    high, plus = _of_shift(x, triples, number, v, vectors, 0.25, TRIPLES)
    low, minus = _of_shift(x, triples, number, v, vectors, -0.25, TRIPLES)
    minus |= 128
    inside = v < vectors
    tl.store(codes + v, tl.where(low > high, minus, plus), mask=inside)
    tl.store(codes + vectors + v, plus, mask=inside)
    tl.store(codes + 2 * vectors + v, minus, mask=inside)
