"""A linear layer in its factors, to learn the scales of a binary weight that is never made.

With u = column * x over the plain channels, the output is (u @ sigma.T) * row + sum(u) * mean and
what the salient channels add. No product makes a gradient as large as the weight.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.methods.ptq161.binary import Binary


class FactoredLinear(nn.Module):
    """binary: the plain channels, at the values where learning begins
    salient: (out, salient) float32, fixed  mask: (in,) bool, the salient channels
    bias: (out,) or None

    What is learned are the logarithms of two factors, 0 where learning begins: of the row scales,
    (out,), and of the column scales, (plain,). The means stay.
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
        return self.binary.row * self.row_log.exp()

    def column(self) -> Tensor:
        return self.binary.column * self.column_log.exp()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in)  ->  (..., out)"""
        u = x.index_select(-1, self.plain_channels) * self.column()
        y = functional.linear(u, self.sigma) * self.row()
        y = y + u.sum(-1, keepdim=True) * self.binary.mean
        if len(self.salient_channels):
            y = y + functional.linear(x.index_select(-1, self.salient_channels), self.salient)
        return y if self.bias is None else y + self.bias
