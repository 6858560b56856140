"""Make layers of the nested format from grids, and their reports."""

from collections.abc import Mapping

from torch import Tensor

from lowbit.formats.nested import NestedLayout, NestedLinear
from lowbit.formats.uniform import UniformLinear
from lowbit.kernels.slicing import MASTER_BITS
from lowbit.methods.matquant.slices import joint_codes
from lowbit.methods.packing import as_stored, pack
from lowbit.methods.result import signal_to_noise
from lowbit.run_report import LinearReport
from lowbit.solvers.correction import Target
from lowbit.solvers.gptq import OrderedFactor
from lowbit.solvers.rounding import Grid


def pack_nested(
    weight: Tensor,
    bias: Tensor | None,
    grid: Grid,
    hessian: OrderedFactor | None,
    weights: Mapping[int, float],
    extra_precision: bool,
    learned: bool,
    targets: Mapping[int, Tensor] | None = None,
) -> NestedLinear:
    """Packs a weight (out, in) as a master: with the nearest codes or those of `joint_codes`.

    hessian: the factored Hessian for `joint_codes`; None for the nearest codes.
    weights: the loss weight of each width.
    learned: whether the grid was learned for these widths. If neither grid nor codes were, the
        layer records 8 bits as the only width that it was trained for.
    targets: see `joint_codes`.
    """
    trained = tuple(weights) if learned or hessian is not None else (MASTER_BITS,)
    layout = NestedLayout(grid.group_size, extra_precision, trained)
    stored = NestedLinear.from_grid(weight, grid.scale, grid.zero, layout, bias=bias)
    if hessian is None:
        return stored
    grid = as_stored(grid, stored)
    codes = joint_codes(weight, grid, hessian, weights, extra_precision, targets)
    zero = None if grid.zero is None else stored.zeros()
    return NestedLinear.from_codes(codes, stored.scale, zero, layout, bias=bias)


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
