"""The Hartley matrix: orthogonal, real, symmetric, of any order, no entry above sqrt(2 / order).

It is used if no Hadamard matrix can be built. QuIP# (arXiv 2402.04396) uses a randomized FFT then,
of which the Hartley transform is the real form. Source: R. N. Bracewell, Discrete Hartley
transform, J. Opt. Soc. Am. 73 (1983).
"""

import math

import torch
from torch import Tensor


def hartley(order: int) -> Tensor:
    """Returns (cos + sin)(2 pi j k / order) / sqrt(order): (order, order) float64."""
    index = torch.arange(order, device="cpu")
    angle = (index[:, None] * index % order).double() * (2 * math.pi / order)
    return (angle.cos() + angle.sin()) / math.sqrt(order)


def fast_hartley(x: Tensor, target: Tensor) -> None:
    """Multiplies by the Hartley matrix along the middle dimension, by FFT.

    x, target: (rows, order, columns), with odd order.
    """
    half = torch.fft.rfft(x, dim=1, norm="ortho")
    kept = half.shape[1]
    torch.sub(half.real, half.imag, out=target[:, :kept])
    target[:, kept:] = (half.real + half.imag)[:, 1:].flip(1)
