"""Slices of 8-bit codes: a model of 2 to 7 bits in the upper bits of one of 8.

MatQuant (arXiv 2502.06786), section 3.1: equation 6, and equation 8 with extra precision.
"""

import torch
from torch import Tensor

MASTER_BITS = 8


def step(bits: int) -> int:
    """How many codes of the master lie between two neighbours of its slice: 2**(8 - bits)."""
    if bits not in range(2, MASTER_BITS + 1):
        raise ValueError(f"bits is {bits}: allowed are 2 to {MASTER_BITS}")
    return 2 ** (MASTER_BITS - bits)


def slice_codes(codes: Tensor, bits: int, extra_precision: bool = False) -> Tensor:
    """The codes of a slice, floor(code / step + 1/2) and at most 2**bits - 1.

    codes: (...) uint8, of the master: a slice of a slice is another one  ->  (...) uint8, in units
    of `step(bits)`, a new tensor. Half rounds up (appendix A): the next bit is added to the upper
    ones. extra_precision: there is one code more, 2**bits.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes is {codes.dtype}: allowed is torch.uint8")
    dropped = MASTER_BITS - bits
    if step(bits) == 1:
        return codes.clone()
    sliced = (codes >> (dropped - 1)).bitwise_and_(1).add_(codes >> dropped)
    return sliced if extra_precision else sliced.clamp_(max=2**bits - 1)
