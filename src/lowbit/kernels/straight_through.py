"""Rounding that gradients pass through, as training through a grid needs it."""

import torch
from torch import Tensor


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


def round_ste(x: Tensor) -> Tensor:
    """torch.round with the gradient of the identity."""
    result: Tensor = _RoundStraightThrough.apply(x)
    return result
