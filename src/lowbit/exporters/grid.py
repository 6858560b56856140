"""A weight on a grid of integers, and the changes of its container that keep it exactly.

    weight = scale * (code - zero / 2**zero_shift)

Layers in the formats uniform and nested are on such a grid; all targets of `lowbit export` except
`dense` store nothing else. Targets differ in the widths, the group sizes and the zero points that
they can hold, so a grid is changed here until it fits. Every change keeps each weight, or is
refused.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.nested import NestedLinear, to_uniform
from lowbit.formats.uniform import UniformLinear
from lowbit.formats.uniform.reference import group_count
from lowbit.kernels.slicing import MASTER_BITS, step

WIDEST = 8  # bits of a code in every container
WITHOUT_FRACTIONS = (  # what to do about zero points that are fractions of a code
    "quantize with fine_zeros=false (matquant: symmetric=true), or export to mlx or gguf, which "
    "take fractions"
)


class Refused(ValueError):
    """A target cannot hold a layer; the message says why, and what to do."""


@dataclass(frozen=True)
class Grid:
    """A weight on a grid of integers.

    codes: (out, in) uint8.
    scale: (out, groups) float16 or float32.
    zero: (out, groups) int32, in units of 2**-zero_shift codes.
    bits: width of a code.
    group_size: number of inputs that share a scale; the last group of a row may be shorter. A
        whole row is a group of in_features.
    zero_shift: zero points are multiples of 2**-zero_shift codes.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    zero_shift: int = 0

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is in the middle of the codes."""
        return self.zero_shift == 0 and bool((self.zero == 2 ** (self.bits - 1)).all())

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def per_row(self) -> bool:
        """Whether a whole row is one group."""
        return self.group_size == self.in_features

    def by_column(self, numbers: Tensor) -> Tensor:
        """Repeats numbers of groups (out, groups) for each input: (out, in)."""
        return numbers.repeat_interleave(self.group_size, 1)[:, : self.in_features]

    def weight(self) -> Tensor:
        """Returns the weight: (out, in) float32."""
        points = self.zero.float() * 2.0**-self.zero_shift
        return self.by_column(self.scale.float()) * (self.codes.float() - self.by_column(points))

    def error(self, weight: Tensor) -> float:
        """Returns the largest difference between a weight and this one, in steps of the grid.

        weight: (out, in) float32.

        A difference where the scale is 0 counts as infinite.
        """
        step_size = self.by_column(self.scale.float()).abs()
        steps = (weight.float() - self.weight()).abs() / step_size
        steps = torch.where(weight.float() == self.weight(), torch.zeros_like(steps), steps)
        return float(steps.nan_to_num(torch.inf, torch.inf).max()) if steps.numel() else 0.0


@dataclass(frozen=True)
class Rows:
    """How the rows of a grid are cut, without their numbers; the fields are those of `Grid`.

    Layouts with one width and group size for the whole model keep these of all layers.
    """

    bits: int
    in_features: int
    group_size: int
    part: int  # inputs of a row that one device holds

    @classmethod
    def of(cls, grid: Grid, part: int) -> "Rows":
        return cls(grid.bits, grid.in_features, grid.group_size, part)

    @property
    def per_row(self) -> bool:
        """Whether a whole row is one group."""
        return self.group_size == self.in_features


def grid_of(layer: QuantizedLinear) -> Grid | None:
    """Returns the grid of a layer at its present width; None: its weight is on no such grid.

    The grid of a layer that rotates its inputs is one of the rotated weight.
    """
    if isinstance(layer, UniformLinear):
        if layer.rotation is not None:
            return None
        spec = layer.spec
        size = min(spec.group_size or layer.in_features, layer.in_features)
        zero = layer.zeros().to(torch.int32)
        return Grid(layer.codes(), layer.scale.detach(), zero, spec.bits, size, spec.zero_shift)
    if isinstance(layer, NestedLinear):
        return _grid_of_slice(layer)
    return None


def _grid_of_slice(layer: NestedLinear) -> Grid:
    """Returns the grid of a slice. One that uses the code 2**bits needs a bit more."""
    bits = layer.bits
    try:
        grid = grid_of(to_uniform(layer, bits))
        assert grid is not None
        return grid
    except ValueError:
        pass
    spec, unit = layer.spec, step(bits)
    size = min(spec.group_size or layer.in_features, layer.in_features)
    scale = layer.scales().detach().float() * unit
    half = scale.to(torch.float16)
    if spec.scale_dtype == "float16" and torch.equal(half.float(), scale):
        scale = half
    codes, zero = layer.codes(), layer.zeros().to(torch.int32)
    shift = MASTER_BITS - bits
    if spec.symmetric:
        zero, shift = zero // unit, 0
    wide = widened(Grid(codes, scale, zero, bits, size, shift), bits + 1, shifted=spec.symmetric)
    return wide


def regrouped(grid: Grid, size: int) -> Grid:
    """Returns the same weight in groups of another size.

    size: number of inputs of the new groups, which must divide the old ones and the row.

    Raises Refused if it does not.
    """
    if size == grid.group_size:
        return grid
    if not divides(grid, size):
        raise Refused(
            f"its rows of {grid.in_features} inputs in groups of {grid.group_size} cannot be "
            f"written in groups of {size}"
        )
    first = torch.arange(0, grid.in_features, size) // grid.group_size
    return replace(grid, scale=grid.scale[:, first], zero=grid.zero[:, first], group_size=size)


def divides(grid: "Grid | Rows", size: int) -> bool:
    """Returns whether `regrouped` can write groups of this size."""
    groups = group_count(grid.in_features, grid.group_size)
    whole = groups == 1 or grid.group_size % size == 0
    part = grid.part if isinstance(grid, Rows) else grid.in_features
    return whole and part % size == 0


def largest_group(grid: Grid, sizes: tuple[int, ...]) -> int | None:
    """Returns the largest of some group sizes that `regrouped` can write; None: it can write none.

    sizes: group sizes that a target can hold.
    """
    return max((size for size in sizes if divides(grid, size)), default=None)


def widened(grid: Grid, bits: int, shifted: bool | None = None) -> Grid:
    """Returns the same weight with codes of more bits.

    bits: the new width, at most 8.
    shifted: whether codes and zero points move up, so that a zero point in the middle of the codes
        stays there; None: they do if the grid is symmetric.
    """
    if bits == grid.bits:
        return grid
    if not grid.bits < bits <= WIDEST:
        raise Refused(f"its codes of {grid.bits} bits cannot be written with {bits} bits")
    if not (grid.symmetric if shifted is None else shifted):
        return replace(grid, bits=bits)
    up = 2 ** (bits - 1) - 2 ** (grid.bits - 1)
    return replace(grid, codes=grid.codes + up, zero=grid.zero + up, bits=bits)


def with_whole_zeros(grid: Grid, most: int = WIDEST) -> Grid:
    """Returns the same weight with zero points that are whole codes, of at most `most` bits.

    Where zero points are fractions of a code, codes get as many more bits as the fractions have.
    No container with fewer bits is exact: the numbers of a group with one odd zero point are
    2**zero_shift apart, and all groups of a layer have codes of one width.

    Raises Refused if that takes more bits.
    """
    if grid.zero_shift == 0:
        return grid
    shift = grid.zero_shift
    while shift and bool((grid.zero % 2 ** (grid.zero_shift - shift + 1) == 0).all()):
        shift -= 1
    zero, unit = grid.zero // 2 ** (grid.zero_shift - shift), 2**shift
    if shift == 0:
        return replace(grid, zero=zero, zero_shift=0)
    bits, scale = grid.bits + shift, grid.scale / unit
    if bits > most:
        raise Refused(
            f"its zero points are fractions of a code, and codes of {grid.bits} bits that hold "
            f"them as whole numbers need {bits} bits; at most {most} are allowed: "
            + WITHOUT_FRACTIONS
        )
    if not torch.equal(scale.float() * unit, grid.scale.float()):
        scale = grid.scale.float() / unit
    codes = grid.codes.to(torch.int32) * unit
    return Grid(codes.to(torch.uint8), scale, zero, bits, grid.group_size)


def half_scales(grid: Grid) -> Grid:
    """Returns the same weight with float16 scales. Raises Refused if float16 rounds one of them."""
    if grid.scale.dtype == torch.float16:
        return grid
    half = grid.scale.to(torch.float16)
    if not torch.equal(half.float(), grid.scale.float()):
        raise Refused(
            "its scales are float32, because float16 would round some of them, and this target "
            "stores float16. Export to ct or mlx, which take float32"
        )
    return replace(grid, scale=half)
