"""Make layers of the nested format from grids, and their reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats.nested import NestedLayout, NestedLinear, SliceGrid
from lowbit.formats.uniform import UniformLinear
from lowbit.kernels.slicing import MASTER_BITS, slice_codes, step
from lowbit.methods.matquant.slices import joint_codes
from lowbit.methods.packing import as_stored, pack
from lowbit.methods.result import signal_to_noise
from lowbit.run_report import LinearReport
from lowbit.solvers.correction import Target
from lowbit.solvers.gptq import OrderedFactor
from lowbit.solvers.refit import refit
from lowbit.solvers.rounding import Grid


@dataclass(frozen=True)
class Slices:
    """What the slices of a linear are to be.

    weights: the weight of each width's squared error.
    extra_precision: whether slices have one more level.
    own_grids: the widths whose slices get scales and zero points of their own, with `joint_codes`.
    """

    weights: Mapping[int, float]
    extra_precision: bool
    own_grids: Sequence[int] = ()


def pack_nested(
    weight: Tensor,
    bias: Tensor | None,
    grid: Grid,
    hessian: OrderedFactor | None,
    slices: Slices,
    learned: bool,
    targets: Mapping[int, Tensor] | None = None,
) -> NestedLinear:
    """Packs a weight (out, in) as a master: with the nearest codes or those of `joint_codes`.

    hessian: the factored Hessian for `joint_codes`; None for the nearest codes.
    slices: what the slices are to be.
    learned: whether the grid was learned for these widths. If neither grid nor codes were, the
        layer records 8 bits as the only width that it was trained for.
    targets: see `joint_codes`.
    """
    weights, extra_precision = slices.weights, slices.extra_precision
    trained = tuple(weights) if learned or hessian is not None else (MASTER_BITS,)
    layout = NestedLayout(grid.group_size, extra_precision, trained)
    stored = NestedLinear.from_grid(weight, grid.scale, grid.zero, layout, bias=bias)
    if hessian is None:
        return stored
    grid = as_stored(grid, stored)
    codes = joint_codes(weight, grid, hessian, weights, extra_precision, targets)
    own: dict[int, Grid] = {}
    if slices.own_grids:
        own = _own_grids(weight, grid, codes, hessian, slices, stored.scale.dtype, targets)
        codes = joint_codes(weight, grid, hessian, weights, extra_precision, targets, own)
        own = _own_grids(weight, grid, codes, hessian, slices, stored.scale.dtype, targets)
    zero = None if grid.zero is None else stored.zeros()
    grids = {width: _slice_grid(each) for width, each in own.items()}
    return NestedLinear.from_codes(codes, stored.scale, zero, layout, own=grids, bias=bias)


def _own_grids(
    weight: Tensor,
    grid: Grid,
    codes: Tensor,
    hessian: OrderedFactor,
    slices: Slices,
    dtype: torch.dtype,
    targets: Mapping[int, Tensor] | None,
) -> dict[int, Grid]:
    """Returns the grids with which slices of the codes are nearest to their targets, by width.

    dtype: that in which the scales are stored.
    """
    inverse = hessian.order.argsort()
    matrix = hessian.damped[inverse][:, inverse]
    own = {}
    for width in slices.own_grids:
        values = slice_codes(codes, width, slices.extra_precision).float() * step(width)
        own[width] = refit((targets or {}).get(width, weight), values, grid, matrix, dtype)
    return own


def _slice_grid(grid: Grid) -> SliceGrid:
    return SliceGrid(grid.scale, None if grid.zero is None else grid.zero.to(torch.uint8))


def stored_grid(grid: Grid, layer: NestedLinear, width: int) -> Grid:
    """Returns the grid of a layer's slice. grid: that of its 8-bit codes."""
    at = layer.at(width)
    zero = None if grid.zero is None else at.zeros().float()
    return replace(grid, scale=at.scales().float(), zero=zero)


def packed_plain(
    weight: Tensor, bias: Tensor | None, grid: Grid, tokens: int, fallback: str | None
) -> tuple[UniformLinear, LinearReport]:
    """Packs a linear that is not sliced; returns the layer and its report."""
    layer = pack(weight, bias, grid)
    decibels = signal_to_noise(weight, layer)
    return layer, LinearReport(signal_to_noise_db=decibels, tokens=tokens, fallback=fallback)


def sliced_report(
    weight: Tensor,
    layer: NestedLinear,
    targets: Mapping[int, Target],
    tokens: int,
    fallback: str | None,
    output_error: float | None = None,
) -> LinearReport:
    """Returns the report of a linear that is sliced. targets: what each width was rounded for."""
    return LinearReport(
        signal_to_noise_db=signal_to_noise(weight, layer),
        slices_db={
            width: signal_to_noise(t.weight, layer.at(width)) for width, t in targets.items()
        },
        output_error=output_error,
        correction=targets[min(targets)].strength,
        tokens=tokens,
        fallback=fallback,
    )
