"""Rounding in kernels as torch rounds: to the nearest integer, halves to the even one."""

import triton
import triton.language as tl


@triton.jit
def nearest_even(x):
    """Returns torch.round(x) for float32.

    Adding 1.5 * 2**23 leaves no bits for a fraction, and the addition itself rounds.
    """
    shifted = (x + 12582912.0) - 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, shifted, x)
