"""From a grid to a layer of the uniform or the nested format."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lowbit.formats.nested import NestedLinear
from lowbit.formats.uniform import UniformLinear
from lowbit.kernels.slicing import MASTER_BITS
from lowbit.solvers.gptq import OrderedFactor, gptq_codes
from lowbit.solvers.nested import joint_codes
from lowbit.solvers.rounding import Grid


def pack(weight: Tensor, bias: Tensor | None, grid: Grid) -> UniformLinear:
    """weight (out, in) rounded to the nearest codes; grid.zero None makes it symmetric."""
    return UniformLinear.from_grid(
        weight,
        grid.scale,
        grid.zero,
        bits=grid.bits,
        group_size=grid.group_size,
        zero_shift=grid.zero_shift,
        bias=bias,
    )


def pack_with_feedback(
    weight: Tensor, bias: Tensor | None, grid: Grid, hessian: OrderedFactor
) -> tuple[UniformLinear, float]:
    """weight (out, in) rounded by GPTQ to the grid as it is stored; and the proxy loss."""
    stored = pack(weight, bias, grid)
    codes, loss = gptq_codes(weight, as_stored(grid, stored), hessian)
    layer = UniformLinear.from_codes(
        codes,
        stored.scale,
        None if grid.zero is None else stored.zeros(),
        bits=grid.bits,
        group_size=grid.group_size,
        zero_shift=grid.zero_shift,
        bias=bias,
    )
    return layer, loss


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
    facts: dict[str, Any] = {
        "group_size": grid.group_size,
        "extra_precision": extra_precision,
        "trained": tuple(weights) if learned or hessian is not None else (MASTER_BITS,),
        "bias": bias,
    }
    stored = NestedLinear.from_grid(weight, grid.scale, grid.zero, **facts)
    if hessian is None:
        return stored
    codes = joint_codes(weight, as_stored(grid, stored), hessian, weights, extra_precision)
    zero = None if grid.zero is None else stored.zeros()
    return NestedLinear.from_codes(codes, stored.scale, zero, **facts)


def as_stored(grid: Grid, layer: UniformLinear | NestedLinear) -> Grid:
    """The grid that a layer's codes are counted on: scales and zero points as it holds them."""
    zero = None if grid.zero is None else layer.zeros() * 2.0**-grid.zero_shift
    return replace(grid, scale=layer.scale.float(), zero=zero)
