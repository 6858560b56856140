"""From a grid to a layer of the uniform format: what the methods that use it share."""

from torch import Tensor

from lowbit.formats.uniform import UniformLinear
from lowbit.solvers.gptq import OrderedFactor, gptq_codes
from lowbit.solvers.rounding import Grid


def pack(weight: Tensor, bias: Tensor | None, grid: Grid) -> UniformLinear:
    """weight (out, in) rounded to the nearest codes; grid.zero None makes it symmetric."""
    return UniformLinear.from_grid(
        weight,
        grid.scale,
        grid.zero,
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.zero is None,
        bias=bias,
    )


def pack_with_feedback(
    weight: Tensor, bias: Tensor | None, grid: Grid, hessian: OrderedFactor
) -> tuple[UniformLinear, float]:
    """weight (out, in) rounded by GPTQ to the grid as it is stored; and the proxy loss."""
    stored = pack(weight, bias, grid)
    zero = None if grid.zero is None else stored.zeros().float()
    rounded_grid = Grid(stored.scale.float(), zero, grid.bits, grid.group_size)
    codes, loss = gptq_codes(weight, rounded_grid, hessian)
    layer = UniformLinear.from_codes(
        codes,
        stored.scale,
        None if grid.zero is None else stored.zeros(),
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.zero is None,
        bias=bias,
    )
    return layer, loss
