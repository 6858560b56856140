"""Round to 8-bit codes whose slices are used too (MatQuant, arXiv 2502.06786, section 3).

Grids are those of `lowbit.solvers.rounding` at 8 bits. Symmetric grids have their zero at 128,
which is a code of every slice.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.kernels.slicing import MASTER_BITS, slice_codes, step
from lowbit.solvers.feedback import Place, round_with_feedback
from lowbit.solvers.gptq import OrderedFactor
from lowbit.solvers.rounding import Grid, grouped, ungrouped

ZERO = 128.0  # the zero point of symmetric grids
TOP = 2**MASTER_BITS - 1
TIE_BREAK = 1e-3  # the least weight of 8 bits in `joint_codes`, as a share of the largest weight


def master_codes(weight: Tensor, grid: Grid) -> Tensor:
    """Returns the nearest 8-bit codes, (out, groups, size) int16, without gradients.

    All slices are cut from them. The values -1 and 256 mark weights outside the grid, which are to
    be clamped to the codes 0 and 255.

    weight: (out, in).
    """
    assert grid.bits == MASTER_BITS
    with torch.no_grad():
        values = grouped(weight, grid.group_size)
        codes = torch.round(values / grid.scale.unsqueeze(-1)) + _zero(grid)
        return codes.clamp(-1, TOP + 1).to(torch.int16)


def fake_slice(
    weight: Tensor, grid: Grid, codes: Tensor, bits: int, extra_precision: bool
) -> Tensor:
    """Returns the weight (out, in) sliced to `bits` bits, with straight-through gradients.

    Rounding and slicing together have the gradient of the identity. A weight that is clamped, by
    the 8-bit codes or by the slice, gets none; it contributes only to the gradients of the scale,
    as in LSQ, and of the zero point.

    weight: (out, in).
    codes: the codes that `master_codes` returns.
    """
    clamped = codes.clamp(0, TOP)
    whole = slice_codes(clamped.to(torch.uint8), bits, extra_precision=True)
    kept = slice_codes(clamped.to(torch.uint8), bits, extra_precision)
    passes = (clamped == codes) & (whole == kept)
    values = grouped(weight, grid.group_size)
    levels, scale = kept.float() * step(bits), grid.scale.unsqueeze(-1)
    sliced: Tensor = _StraightThrough.apply(values, scale, levels, _zero(grid), passes)
    return ungrouped(sliced, weight.shape[1])


class _StraightThrough(torch.autograd.Function):
    """scale * (levels - zero), differentiated as scale * (values / scale) where it passes."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        values: Tensor,
        scale: Tensor,
        levels: Tensor,
        zero: Tensor | float,
        passes: Tensor,
    ) -> Tensor:
        offset = levels - zero
        ctx.save_for_backward(values, scale, offset, passes)
        return scale * offset

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, Tensor, None, Tensor | None, None]:
        values, scale, offset, passes = ctx.saved_tensors  # type: ignore[attr-defined]
        by_scale = (gradient * (offset - passes * (values / scale))).sum(-1, keepdim=True)
        by_zero = None
        if ctx.needs_input_grad[3]:  # type: ignore[attr-defined]
            by_zero = (-scale * gradient * ~passes).sum(-1, keepdim=True)
        return gradient * passes, by_scale, None, by_zero, None


def joint_codes(
    weight: Tensor,
    grid: Grid,
    hessian: OrderedFactor,
    weights: Mapping[int, float],
    extra_precision: bool,
    targets: Mapping[int, Tensor] | None = None,
    own: Mapping[int, Grid] | None = None,
) -> Tensor:
    """Chooses one 8-bit code per weight that is good at several widths: GPTQ for all of them.

    Columns are rounded one by one, as in GPTQ. Each width feeds its own error forward and therefore
    has its own target. Of the 256 codes, the one is chosen whose slices have the least weighted
    squared distance to the targets. (MatGPTQ, arXiv 2602.03537, feeds forward the mean of the
    errors, so that all widths have the same target. The nearest code is then within half a code of
    the best at every width, and a search gains nothing.)

    weight: (out, in).
    grid: the 8-bit grid, with scales rounded to the dtype in which they are stored.
    hessian: the factored Hessian, from `ordered_factor`.
    weights: the weight of each width's squared error.
    extra_precision: whether slices have one more level.
    targets: (out, in) each, what a width is rounded for instead of the weight, by width.
    own: the grids of widths whose slices have their own, in units of the 8-bit codes.

    Returns the codes, (out, in) uint8.
    """
    # Codes with equal slices at all widths: 8 bits have a small weight, so the nearest one wins.
    floor = TIE_BREAK * max(weights.values())
    weights = {**weights, MASTER_BITS: max(weights.get(MASTER_BITS, 0.0), floor)}
    rows, columns = weight.shape
    every = torch.arange(TOP + 1, dtype=torch.uint8, device=weight.device)
    # The value of each code at each width, (widths, 256), relative to 128 to keep squares small.
    levels = torch.stack(
        [slice_codes(every, b, extra_precision).float() * step(b) - ZERO for b in weights]
    )
    share = torch.tensor(list(weights.values()), device=weight.device) / sum(weights.values())
    quadratic = torch.cat([levels.square(), -2 * levels])
    grids = [(own or {}).get(width, grid) for width in weights]
    scales = torch.stack([each.scale for each in grids])  # (widths, out, groups)
    zeros = torch.stack([_zeros(each) for each in grids])
    # A step of each width, in steps of the 8-bit codes, squared.
    ratios = share[:, None, None] * (scales / grid.scale).square()
    group_of = (hessian.order // (grid.group_size or columns)).tolist()

    def choose(place: Place, target: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(place.columns, int)
        group = group_of[place.columns]
        scale, offset = scales[:, :, group], zeros[:, :, group] - ZERO
        targets, ratio = target.view(len(levels), rows) / scale + offset, ratios[:, :, group]
        # The squared distance to the targets, without the terms that all codes have in common.
        codes = (torch.cat([ratio, ratio * targets]).T @ quadratic).argmin(1)
        values = (levels[:, codes] - offset) * scale
        return codes.repeat(len(levels))[:, None], values.reshape(-1, 1)

    wanted = [(targets or {}).get(width, weight) for width in weights]
    stacked = torch.cat(wanted)[:, hessian.order]
    rounded = round_with_feedback(stacked, hessian.factor, choose, block=1)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    codes[:, hessian.order] = rounded.codes[:rows].squeeze(-1).to(torch.uint8)
    return codes


def _zeros(grid: Grid) -> Tensor:
    return torch.full_like(grid.scale, ZERO) if grid.zero is None else grid.zero


def _zero(grid: Grid) -> Tensor | float:
    return ZERO if grid.zero is None else grid.zero.unsqueeze(-1)
