"""Make layers of the uniform format from grids, and read the grid that a layer stores."""

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from lowbit.formats.uniform import UniformLayout, UniformLinear
from lowbit.solvers.gptq import OrderedFactor, gptq_codes
from lowbit.solvers.rounding import Grid


def pack(weight: Tensor, bias: Tensor | None, grid: Grid) -> UniformLinear:
    """weight (out, in) rounded to the nearest codes; grid.zero None makes it symmetric."""
    return UniformLinear.from_grid(weight, grid.scale, grid.zero, layout_of(grid), bias=bias)


def pack_with_feedback(
    weight: Tensor,
    bias: Tensor | None,
    grid: Grid,
    hessian: OrderedFactor,
    outputs: OrderedFactor | None = None,
) -> tuple[UniformLinear, float]:
    """Rounds a weight (out, in) by GPTQ to the stored grid; returns layer and proxy loss.

    hessian, outputs: as in `gptq_codes`.
    """
    stored = pack(weight, bias, grid)
    codes, loss = gptq_codes(weight, as_stored(grid, stored), hessian, outputs)
    zero = None if grid.zero is None else stored.zeros()
    layer = UniformLinear.from_codes(codes, stored.scale, zero, layout_of(grid), bias=bias)
    return layer, loss


def layout_of(grid: Grid) -> UniformLayout:
    """How a layer stores codes of this grid."""
    return UniformLayout(grid.bits, grid.group_size, grid.zero_shift)


class OnGrid(Protocol):
    """A layer that stores a scale and a zero point for each group."""

    scale: Tensor

    def zeros(self) -> Tensor:
        """Returns the stored zero points, (out, groups) uint8."""


def as_stored(grid: Grid, layer: OnGrid) -> Grid:
    """Returns the grid with the scales and zero points that the layer stores.

    They differ from those of `grid` by the rounding to the stored dtypes.
    """
    zero = None if grid.zero is None else layer.zeros() * 2.0**-grid.zero_shift
    return replace(grid, scale=layer.scale.float(), zero=zero)


def stored_grid(layer: UniformLinear) -> Grid:
    """Returns the grid that a layer stores."""
    spec = layer.spec
    zero = None if spec.symmetric else layer.zeros() * 2.0**-spec.zero_shift
    return Grid(
        layer.scale.float(),
        zero,
        bits=spec.bits,
        group_size=spec.group_size,
        zero_shift=spec.zero_shift,
    )
