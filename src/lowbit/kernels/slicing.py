"""Slices of 8-bit codes: codes of 2 to 7 bits that are the rounded upper bits of 8-bit codes.

Source: MatQuant (arXiv 2502.06786), section 3.1, equation 6; equation 8 with extra precision.
"""

import torch
from torch import Tensor

MASTER_BITS = 8


def step(bits: int) -> int:
    """Returns the distance of two neighbouring codes of a slice, in 8-bit codes: 2**(8 - bits)."""
    if bits not in range(2, MASTER_BITS + 1):
        raise ValueError(f"bits is {bits}: allowed are 2 to {MASTER_BITS}")
    return 2 ** (MASTER_BITS - bits)


def rounded_codes(codes: Tensor, bits: int, extra_precision: bool = False) -> Tensor:
    """Rounds 8-bit codes to those that a slice can hold: step * floor(code / step + 1/2).

    Halves are rounded up (appendix A).

    codes: (...) uint8, the 8-bit codes; slicing a slice would give another result.
    bits: width of the slice, 2 to 8.
    extra_precision: whether 256 is allowed; else 256 - step is the largest.

    Returns (...) uint8, or int16 with extra precision; a new tensor.
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
    """Returns the codes of a slice: floor(code / step + 1/2), at most 2**bits - 1.

    codes, bits: as for `rounded_codes`.
    extra_precision: whether there is one code more, 2**bits.

    Returns (...) uint8, in units of `step(bits)`; a new tensor.
    """
    rounded = rounded_codes(codes, bits, extra_precision)
    return rounded.bitwise_right_shift_(MASTER_BITS - bits).to(torch.uint8)
