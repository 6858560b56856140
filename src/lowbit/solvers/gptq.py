"""GPTQ on a given uniform grid (Frantar et al., arXiv 2210.17323): which codes, not which grid."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.solvers.feedback import damped_factor, proxy_loss, round_with_feedback
from lowbit.solvers.rounding import Grid, nearest_code


@dataclass(frozen=True)
class OrderedFactor:
    """A Hessian ready for rounding: order (n,) int64, damped H and L (n, n) in that order."""

    order: Tensor
    damped: Tensor
    factor: Tensor


def ordered_factor(hessian: Tensor, damping: float, act_order: bool) -> OrderedFactor | None:
    """The Hessian in the order of rounding; None if it is not positive definite.

    act_order: the inputs with most energy are rounded first.
    """
    # Rounding goes from the last column to the first.
    every = torch.arange(len(hessian), device=hessian.device)
    order = hessian.diagonal().argsort() if act_order else every
    factored = damped_factor(hessian[order][:, order], damping, block=1)
    return None if factored is None else OrderedFactor(order, *factored)


def gptq_codes(weight: Tensor, grid: Grid, hessian: OrderedFactor) -> tuple[Tensor, float]:
    """(codes (out, in) uint8, proxy loss). grid: with the scale as it is stored."""
    size = grid.group_size or weight.shape[1]
    group_of = (hessian.order // size).tolist()
    zeros = torch.full_like(grid.scale, 2.0 ** (grid.bits - 1)) if grid.zero is None else grid.zero

    def nearest(column: int, target: Tensor) -> tuple[Tensor, Tensor]:
        group = group_of[column]
        scale, zero = grid.scale[:, group, None], zeros[:, group, None]
        codes = nearest_code(target / scale, zero).clamp(0, grid.top)
        return codes.to(torch.uint8), scale * (codes - zero)

    ordered = weight[:, hessian.order]
    rounded = round_with_feedback(ordered, hessian.factor, nearest, block=1)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    codes[:, hessian.order] = rounded.codes.squeeze(-1)
    return codes, proxy_loss(ordered, rounded.values, hessian.damped)
