"""Rounds activations token by token in one kernel, as `lowbit.kernels.tokens` defines it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.launch import power_of_two
from lowbit.kernels.triton.rounding import nearest_even

MOST = 4096  # channels that a program reads at a time


def round_tokens(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Rounds every row of x to 2^bits equidistant values that span its range and 0.

    x: (..., channels) of any float dtype but float64. The others as for the function in torch.

    Returns the same shape and dtype, contiguous.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    channels = x.shape[-1]
    if x.numel():
        block = min(MOST, power_of_two(channels))
        _round[(x.numel() // channels,)](
            x, out, channels, TOP=2**bits - 1, SYMMETRIC=symmetric, BLOCK=block
        )
    return out


@triton.jit
def _round(x, out, channels, TOP: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * channels
    lows = tl.zeros((BLOCK,), dtype=tl.float32)
    highs = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, channels, BLOCK):
        c = first + tl.arange(0, BLOCK)
        value = tl.load(x + start + c, mask=c < channels, other=0.0).to(tl.float32)
        lows, highs = tl.minimum(lows, value), tl.maximum(highs, value)
    low, high = tl.min(lows, 0), tl.max(highs, 0)
    span = high - low
    if SYMMETRIC:
        span = 2 * tl.maximum(high, -low)
    scale = tl.maximum(tl.div_rn(span, tl.full((), TOP, tl.float32)), 1.1754943508222875e-38)
    scale = tl.where(span > 0, scale, 1.0)
    if SYMMETRIC:
        zero = tl.full((), (TOP + 1) // 2, tl.float32)
    else:
        zero = nearest_even(tl.div_rn(-low, scale))
    for first in range(0, channels, BLOCK):
        c = first + tl.arange(0, BLOCK)
        value = tl.load(x + start + c, mask=c < channels, other=0.0).to(tl.float32)
        steps = nearest_even(tl.div_rn(value, tl.zeros((BLOCK,), tl.float32) + scale))
        code = tl.minimum(tl.maximum(steps + zero, 0.0), TOP)
        rounded = (code - zero) * scale
        tl.store(out + start + c, rounded.to(out.dtype.element_ty), mask=c < channels)
