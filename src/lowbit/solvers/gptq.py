"""GPTQ on a given uniform grid: chooses the codes, not the grid.

Source: GPTQ (Frantar et al., arXiv 2210.17323).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.solvers.feedback import damped_factor, proxy_loss, round_with_feedback
from lowbit.solvers.rounding import Grid, nearest_code


@dataclass(frozen=True)
class OrderedFactor:
    """A factored Hessian whose inputs are reordered for rounding.

    order: (n,) int64, the input at each position. Rounding begins with the last position.
    damped: (n, n), the damped Hessian in this order.
    factor: (n, n), its factor L; see `damped_factor`.
    """

    order: Tensor
    damped: Tensor
    factor: Tensor


def ordered_factor(hessian: Tensor, damping: float, act_order: bool) -> OrderedFactor | None:
    """Returns the factored Hessian, or None if it is not positive definite.

    hessian: (n, n) float32.
    damping: the share of the mean diagonal that is added to the diagonal.
    act_order: whether the inputs with the most energy are rounded first.
    """
    every = torch.arange(len(hessian), device=hessian.device)
    order = hessian.diagonal().argsort() if act_order else every
    factored = damped_factor(hessian[order][:, order], damping, block=1)
    return None if factored is None else OrderedFactor(order, *factored)


def gptq_codes(weight: Tensor, grid: Grid, hessian: OrderedFactor) -> tuple[Tensor, float]:
    """Rounds a weight to a grid with error feedback.

    weight: (out, in).
    grid: the grid, with scales rounded to the dtype in which they are stored.
    hessian: the factored Hessian, from `ordered_factor`.

    Returns the codes, (out, in) uint8, and the proxy loss.
    """
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
