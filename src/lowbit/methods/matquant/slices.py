"""Rounding to 8-bit codes whose slices are used too (MatQuant, arXiv 2502.06786, section 3).

Grids are those of `lowbit.solvers.rounding` at 8 bits; symmetric ones have their zero at 128, which
is a code of every slice.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.kernels.slicing import MASTER_BITS, slice_codes, step
from lowbit.solvers.feedback import round_with_feedback
from lowbit.solvers.gptq import OrderedFactor
from lowbit.solvers.rounding import Grid, grouped, ungrouped

ZERO = 128.0  # of symmetric grids
TOP = 2**MASTER_BITS - 1
TIE_BREAK = 1e-3  # share of the largest weight that the master has at least


def master_codes(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, (out, groups, size) int16; -1 and 256 stand for what had to be clamped.

    weight: (out, in). All slices are cut from these, and no gradient passes through them.
    """
    assert grid.bits == MASTER_BITS
    with torch.no_grad():
        values = grouped(weight, grid.group_size)
        codes = torch.round(values / grid.scale.unsqueeze(-1)) + _zero(grid)
        return codes.clamp(-1, TOP + 1).to(torch.int16)


def fake_slice(
    weight: Tensor, grid: Grid, codes: Tensor, bits: int, extra_precision: bool
) -> Tensor:
    """The weight at `bits` bits, (out, in); gradients pass to the weight and to the grid's scale.

    codes: from `master_codes`. The gradient is straight through rounding and slicing together: that
    of the identity, but none to a weight that the 8-bit codes or the slice clamp; it has gradient
    only through the scale, as in LSQ.
    """
    clamped = codes.clamp(0, TOP)
    whole = slice_codes(clamped.to(torch.uint8), bits, extra_precision=True)
    kept = slice_codes(clamped.to(torch.uint8), bits, extra_precision)
    passes = (clamped == codes) & (whole == kept)
    values = grouped(weight, grid.group_size)
    offset = kept.float() * step(bits) - _zero(grid)
    sliced: Tensor = _StraightThrough.apply(values, grid.scale.unsqueeze(-1), offset, passes)
    return ungrouped(sliced, weight.shape[1])


class _StraightThrough(torch.autograd.Function):
    """scale * offset, as if it were scale * (values / scale + constant) where it passes."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        values: Tensor,
        scale: Tensor,
        offset: Tensor,
        passes: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(values, scale, offset, passes)
        return scale * offset

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        values, scale, offset, passes = ctx.saved_tensors  # type: ignore[attr-defined]
        by_scale = gradient * (offset - passes * (values / scale))
        return gradient * passes, by_scale.sum(-1, keepdim=True), None, None


def joint_codes(
    weight: Tensor,
    grid: Grid,
    hessian: OrderedFactor,
    weights: Mapping[int, float],
    extra_precision: bool,
) -> Tensor:
    """Codes that are good at several widths at once, (out, in) uint8: GPTQ with one code for all.

    weight: (out, in)  grid: with the scale as it is stored  weights: of each width's squared error

    Column by column, as in GPTQ, every width feeds its own error forward and so has its own target;
    of the 256 codes the one is taken whose slices are nearest to all targets, by weight. (MatGPTQ,
    arXiv 2602.03537, feeds forward the mean of the errors, and so has one target: for that the
    nearest code is within half a code of the best at every width, and the search changes nothing.)
    """
    floor = TIE_BREAK * max(weights.values())  # codes that no width tells apart: nearest of 8 bits
    weights = {**weights, MASTER_BITS: max(weights.get(MASTER_BITS, 0.0), floor)}
    rows, columns = weight.shape
    every = torch.arange(TOP + 1, dtype=torch.uint8, device=weight.device)
    # (widths, 256), counted from the middle to keep squares small
    levels = torch.stack(
        [slice_codes(every, b, extra_precision).float() * step(b) - ZERO for b in weights]
    )
    share = torch.tensor(list(weights.values()), device=weight.device) / sum(weights.values())
    squares = (share[:, None] * levels.square()).sum(0)
    zeros = torch.full_like(grid.scale, ZERO) if grid.zero is None else grid.zero
    group_of = (hessian.order // (grid.group_size or columns)).tolist()

    def choose(column: int, target: Tensor) -> tuple[Tensor, Tensor]:
        group = group_of[column]
        scale, offset = grid.scale[:, group], zeros[:, group] - ZERO
        wanted = target.view(len(levels), rows) / scale + offset
        codes = (squares - 2 * (share[:, None] * wanted).T @ levels).argmin(1)
        values = (levels[:, codes] - offset) * scale
        return codes.repeat(len(levels))[:, None], values.reshape(-1, 1)

    stacked = weight[:, hessian.order].repeat(len(levels), 1)
    rounded = round_with_feedback(stacked, hessian.factor, choose, block=1)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    codes[:, hessian.order] = rounded.codes[:rows].squeeze(-1).to(torch.uint8)
    return codes


def _zero(grid: Grid) -> Tensor | float:
    return ZERO if grid.zero is None else grid.zero.unsqueeze(-1)
