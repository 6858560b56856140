"""Rounding with a straight-through gradient, for training through quantization."""

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
    """Returns torch.round(x), with the gradient of the identity (straight-through estimator)."""
    result: Tensor = _RoundStraightThrough.apply(x)
    return result
