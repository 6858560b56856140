"""Fit scales and zero points to codes that are given.

The codes stay; each group gets the scale and the zero point with the least error of the layer's
output, by least squares. The groups of a row follow one another, each with the others as they are.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.kernels.products import product
from lowbit.solvers.rounding import Grid

SWEEPS = 2  # over all groups; a row of one group needs one


def refit(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, stored: torch.dtype) -> Grid:
    """Returns a grid for the codes, with an output error nowhere above that of the given grid.

    target: (out, in) float32, what the codes were chosen for.
    codes: (out, in), in units of the grid.
    hessian: (in, in) float32, of the layer's inputs.
    stored: the dtype that scales are rounded to.

    Zero points are whole codes of the grid; symmetric grids keep theirs.
    """
    fixed = 2.0 ** (grid.bits - 1)
    scale = grid.scale.clone()
    zero = torch.full_like(scale, fixed) if grid.zero is None else grid.zero.clone()
    codes = codes.float()
    spans = list(_spans(target.shape[1], grid.group_size))
    error = torch.empty_like(target)
    for group, at in enumerate(spans):
        error[:, at] = target[:, at] - _values(codes[:, at], scale, zero, group)
    for _ in range(SWEEPS if len(spans) > 1 else 1):
        for group, at in enumerate(spans):
            own, part = hessian[at, at].contiguous(), codes[:, at]
            now = _values(part, scale, zero, group)
            wanted = product(error, hessian[:, at].contiguous()) + product(now, own)
            top = None if grid.zero is None else grid.top
            fit, point = _fitted(part, zero[:, group], wanted, own, top)
            fit = fit.to(stored).float()
            better = _gain(now, fit, point, part, wanted, own) > 0
            scale[:, group] = torch.where(better, fit, scale[:, group])
            zero[:, group] = torch.where(better, point, zero[:, group])
            error[:, at] += now - _values(part, scale, zero, group)
    return replace(grid, scale=scale, zero=None if grid.zero is None else zero)


def _spans(columns: int, size: int | None) -> Iterator[slice]:
    for first in range(0, columns, size or columns):
        yield slice(first, min(first + (size or columns), columns))


def _values(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    return scale[:, group, None] * (codes - zero[:, group, None])


def _fitted(
    codes: Tensor, zero: Tensor, wanted: Tensor, hessian: Tensor, top: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the best scale and zero point of one group, (out,) each.

    wanted: (out, size), the wanted values times the Hessian.
    hessian: (size, size).
    top: the highest zero point; None: zero points stay.
    """
    centred = codes - zero[:, None]
    if top is not None:
        # values = a * centred + b, by the normal equations; zero - b / a is the new zero point.
        with_one = hessian.sum(1)
        squares, mixed = (product(centred, hessian) * centred).sum(1), centred @ with_one
        by_code, by_one = (wanted * centred).sum(1), wanted.sum(1)
        a = by_code * with_one.sum() - by_one * mixed
        b = by_one * squares - by_code * mixed
        zero = torch.nan_to_num(zero - b / a).round().clamp(0, top)
        centred = codes - zero[:, None]
    return (wanted * centred).sum(1) / (product(centred, hessian) * centred).sum(1), zero


def _gain(
    now: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, wanted: Tensor, hessian: Tensor
) -> Tensor:
    """Returns by how much new values lower the squared error of the output, (out,).

    It is not above 0 for a scale that is not finite or not above 0.
    """
    new = scale[:, None] * (codes - zero[:, None])
    lost = [(product(v, hessian) * v).sum(1) - 2 * (v * wanted).sum(1) for v in (now, new)]
    return torch.where(scale.isfinite() & (scale > 0), lost[0] - lost[1], 0.0).nan_to_num(0.0)
