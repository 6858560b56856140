"""A linear layer that multiplies by the factors of a binary weight, to learn its scales.

With u = column * x over the plain channels, the output is (u @ sigma.T) * row + sum(u) * mean plus
the output of the salient channels. The weight is never computed, so that no gradient has its size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.methods.ptq161.binary import Binary


class FactoredLinear(nn.Module):
    """A linear layer with binary weights whose row and column scales are learned.

    The parameters are the logarithms of factors of the initial scales, 0 at the beginning: row_log
    (out,) and column_log (plain,). Means of rows are not learned.

    binary: the weights of the plain channels, with initial scales.
    salient: (out, salient) float32, the weights of the salient channels, which are fixed.
    mask: (in,) bool, the salient channels.
    bias: (out,) or None.
    """

    sigma: Tensor

    def __init__(self, binary: Binary, salient: Tensor, mask: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.binary = binary
        self.salient = salient
        self.bias = bias
        self.plain_channels = (~mask).nonzero().squeeze(1)
        self.salient_channels = mask.nonzero().squeeze(1)
        self.sigma = binary.signs()
        self.row_log = nn.Parameter(torch.zeros_like(binary.row))
        self.column_log = nn.Parameter(torch.zeros_like(binary.column))

    def row(self) -> Tensor:
        """Returns the learned row scales: (out,)."""
        return self.binary.row * self.row_log.exp()

    def column(self) -> Tensor:
        """Returns the learned column scales: (plain,)."""
        return self.binary.column * self.column_log.exp()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in)  ->  (..., out)"""
        u = x.index_select(-1, self.plain_channels) * self.column()
        y = functional.linear(u, self.sigma) * self.row()
        y = y + u.sum(-1, keepdim=True) * self.binary.mean
        if len(self.salient_channels):
            y = y + functional.linear(x.index_select(-1, self.salient_channels), self.salient)
        return y if self.bias is None else y + self.bias
