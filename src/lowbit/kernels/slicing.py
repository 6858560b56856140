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


def rounded_codes(codes: Tensor, bits: int, extra_precision: bool = False) -> Tensor:
    """The code of the master that each slice stands for: step * floor(code / step + 1/2).

    codes: (...) uint8, of the master: a slice of a slice is another one. Half rounds up (appendix
    A). extra_precision: 256 may be reached, else 256 - step is the largest.
    ->  (...) uint8, with extra precision int16, a new tensor
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes is {codes.dtype}: allowed is torch.uint8")
    half = step(bits) // 2
    if half == 0:
        return codes.clone()
    if extra_precision:
        return codes.to(torch.int16).add_(half).bitwise_and_(-2 * half)
    return codes.clamp(max=255 - half).add_(half).bitwise_and_(256 - 2 * half)


def slice_codes(codes: Tensor, bits: int, extra_precision: bool = False) -> Tensor:
    """The codes of a slice, floor(code / step + 1/2), at most 2**bits - 1; see `rounded_codes`.

    extra_precision: there is one code more, 2**bits.
    ->  (...) uint8, in units of `step(bits)`, a new tensor
    """
    rounded = rounded_codes(codes, bits, extra_precision)
    return rounded.bitwise_right_shift_(MASTER_BITS - bits).to(torch.uint8)
