"""The Hartley matrix: orthogonal, real, symmetric, of any order, no entry above sqrt(2 / order).

R. N. Bracewell, Discrete Hartley transform, J. Opt. Soc. Am. 73 (1983). Stands in where no Hadamard
matrix can be built, as the randomized FFT does in QuIP# (arXiv 2402.04396), whose real form it is.
"""

import math

import torch
from torch import Tensor


def hartley(order: int) -> Tensor:
    """(cos + sin)(2 pi j k / order) / sqrt(order).  ->  (order, order) float64"""
    index = torch.arange(order, device="cpu")
    angle = (index[:, None] * index % order).double() * (2 * math.pi / order)
    return (angle.cos() + angle.sin()) / math.sqrt(order)


def fast_hartley(x: Tensor, target: Tensor) -> None:
    """The matrix on the middle dimension, by FFT.  x, target: (rows, order, columns), order odd"""
    half = torch.fft.rfft(x, dim=1, norm="ortho")
    kept = half.shape[1]
    torch.sub(half.real, half.imag, out=target[:, :kept])
    target[:, kept:] = (half.real + half.imag)[:, 1:].flip(1)
