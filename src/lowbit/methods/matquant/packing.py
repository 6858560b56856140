"""Make layers of the nested format from grids."""

from collections.abc import Mapping

from torch import Tensor

from lowbit.formats.nested import NestedLayout, NestedLinear
from lowbit.kernels.slicing import MASTER_BITS
from lowbit.methods.matquant.slices import joint_codes
from lowbit.methods.packing import as_stored
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
) -> NestedLinear:
    """Packs a weight (out, in) as a master: with the nearest codes or those of `joint_codes`.

    hessian: the factored Hessian for `joint_codes`; None for the nearest codes.
    weights: the loss weight of each width.
    learned: whether the grid was learned for these widths. If neither grid nor codes were, the
        layer records 8 bits as the only width that it was trained for.
    """
    trained = tuple(weights) if learned or hessian is not None else (MASTER_BITS,)
    layout = NestedLayout(grid.group_size, extra_precision, trained)
    stored = NestedLinear.from_grid(weight, grid.scale, grid.zero, layout, bias=bias)
    if hessian is None:
        return stored
    codes = joint_codes(weight, as_stored(grid, stored), hessian, weights, extra_precision)
    zero = None if grid.zero is None else stored.zeros()
    return NestedLinear.from_codes(codes, stored.scale, zero, layout, bias=bias)
