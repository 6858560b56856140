"""From a grid to a layer of the nested format."""

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
    """weight (out, in) as a master: the nearest codes, or with a Hessian those of `joint_codes`.

    weights: what the error of each width counts. learned: whether the grid was made for these
    widths, too; if nothing was, it is the master of 8 bits alone that is made well.
    """
    trained = tuple(weights) if learned or hessian is not None else (MASTER_BITS,)
    layout = NestedLayout(grid.group_size, extra_precision, trained)
    stored = NestedLinear.from_grid(weight, grid.scale, grid.zero, layout, bias=bias)
    if hessian is None:
        return stored
    codes = joint_codes(weight, as_stored(grid, stored), hessian, weights, extra_precision)
    zero = None if grid.zero is None else stored.zeros()
    return NestedLinear.from_codes(codes, stored.scale, zero, layout, bias=bias)
