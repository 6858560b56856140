"""The learned parameters of OmniQuant for one block: clipping ranges and channel scales.

Source: OmniQuant (arXiv 2308.13137), sections 3.2 and 3.3. The methods that use them define the
rounding and the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.blocks import BlockTask, Fold
from lowbit.blocks.folding import Tensors, apply_folds, tensors_of
from lowbit.blocks.start import Start
from lowbit.blocks.statistics import ChannelStatistics, tokens_by_linear
from lowbit.blocks.training import ParameterGroup
from lowbit.solvers.clipping import LearnedClipping, rounding_error, search_clipping
from lowbit.solvers.equivalence import middle_shift, searched_scale, smooth_scale
from lowbit.solvers.rounding import Grid, GridShape, code_values, extremes, grid_from_range

SCALED = ("norm", "values")  # the kinds of folds whose scales are learned for weights alone
Statistics = Mapping[str, ChannelStatistics]  # by the name of a LinearGroup or linear


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Settings of `BlockLearner`: which parameters are learned, and from which initial values.

    lwc: whether clipping ranges are learned (learnable weight clipping).
    let: whether channel scales are learned (learnable equivalent transformation).
    lwc_lr, let_lr: the learning rates of both.
    alpha: the exponent of activations in SmoothQuant's formula for initial scales.
    init: the initial values: "minmax" for whole ranges and SmoothQuant's formula, "awq" for a
        search of both.
    inputs: whether the inputs of linears and attentions are rounded too. `let` then also shifts
        channels where biases can absorb a shift, and scales queries against keys.
    codes: whether codes are learned, after all of this (`lowbit.solvers.learned_rounding`).
    """

    lwc: bool
    let: bool
    lwc_lr: float
    let_lr: float
    alpha: float
    init: Literal["minmax", "awq"]
    inputs: bool
    codes: bool = False


class BlockLearner:
    """The learned parameters of one block; computes its folded tensors and its grids from them.

    task: the block, with what an earlier run learned.
    statistics: the statistics of the input of each `LinearGroup`, by the group's name.
    unclipped: linears whose whole range is kept, unless an earlier run has clipped them.
    learning: the settings.
    shapes: the settings of the grid of every linear that is quantized, by name.
    """

    def __init__(
        self,
        task: BlockTask,
        statistics: Statistics,
        unclipped: set[str],
        learning: Learning,
        shapes: Mapping[str, GridShape],
    ) -> None:
        self.learning = learning
        self.shapes = shapes
        self.float_tensors = tensors_of(task.block)
        self.tokens = tokens_by_linear(task.groups, statistics)
        self.linears = list(self.tokens)
        # Of weights that no fold moves: what `rotated` returns, and the ends of their groups.
        self.constant_rotated: Tensors = {}
        self._constant_ends: dict[str, tuple[Tensor, Tensor]] = {}
        self.start = Start(task)
        by_reader = {name: statistics[g.name] for g in task.groups for name in g.linears}
        inputs = {name: s for name, s in by_reader.items() if s.tokens}
        self.folds: dict[str, Fold] = {}
        if learning.let:
            attention = learning.inputs and bool(task.attentions)
            self.folds = {f.name: f for f in task.folds if _can_help(f, self.linears, attention)}
        self.shifts = {
            name: nn.Parameter(self._first_shift(fold, inputs))
            for name, fold in self.folds.items()
            if learning.inputs and fold.shiftable
        }
        # Scales are learned as logarithms, so that they stay positive.
        self.log_scales = {
            name: nn.Parameter(self._first_log_scale(fold, inputs))
            for name, fold in self.folds.items()
        }
        self.clipping: dict[str, LearnedClipping] = {}
        if learning.lwc:
            folded = self.folded()
            self.clipping = {
                name: self._first_clipping(folded[f"{name}.weight"].detach(), inputs, name)
                for name in self.linears
                if name not in unclipped or f"{name}.clip_low" in self.start
            }
        # The codes that an earlier run learned: the values of each weight, and its grid.
        self.earlier: dict[str, tuple[Tensor, Grid]] = {}
        for name in self.linears if learning.codes else ():
            codes = self._earlier_codes(name)
            if codes is not None:
                self.earlier[name] = codes
        self.start.check_used()

    def _earlier_codes(self, name: str) -> tuple[Tensor, Grid] | None:
        shape, size = self.shapes[name], self.float_tensors[f"{name}.weight"].shape
        groups = extremes(self.float_tensors[f"{name}.weight"], shape.group_size)[0].shape
        codes = self.start.take(f"{name}.codes", size)
        scale = self.start.take(f"{name}.scale", groups)
        zero = None if shape.symmetric else self.start.take(f"{name}.zero", groups)
        if codes is None or scale is None or (zero is None and not shape.symmetric):
            return None
        grid = Grid(
            scale, zero, bits=shape.bits, group_size=shape.group_size, zero_shift=shape.zero_shift
        )
        return code_values(codes, grid), grid

    def squared_error(self, name: str, weight: Tensor, grid: Grid) -> Tensor:
        """Returns the squared error of a rounded weight, (out, in), for the search of `init`."""
        return rounding_error(weight, grid)

    def rotated(self, name: str, weight: Tensor) -> Tensor:
        """Returns a folded weight as it is rounded, (out, in); some methods rotate it first."""
        return weight

    def rotated_squares(self, name: str, squares: Tensor) -> Tensor:
        """Returns the mean squares of the input, (in,), that belong to the rotated weight."""
        return squares

    def _first_shift(self, fold: Fold, inputs: Statistics) -> Tensor:
        started = self.start.take(f"fold.{fold.name}.shift", (fold.size,))
        if started is not None:
            return started
        device = self.float_tensors[f"{fold.source}.weight"].device
        if self.learning.init == "awq":  # its search assumes inputs that are not shifted
            return torch.zeros(fold.size, device=device)
        return middle_shift(fold, inputs, device)

    def _first_log_scale(self, fold: Fold, inputs: Statistics) -> Tensor:
        started = self.start.take(f"fold.{fold.name}.log_scale", (fold.size,))
        if started is not None:
            return started
        if self.learning.init == "awq":
            return searched_scale(fold, self.float_tensors, inputs, self.whole_range_error).log()
        shift = self.shifts[fold.name].detach() if fold.name in self.shifts else 0.0
        return smooth_scale(fold, self.float_tensors, inputs, self.learning.alpha, shift).log()

    def _first_clipping(self, weight: Tensor, inputs: Statistics, name: str) -> LearnedClipping:
        shape, weight = self.shapes[name], self.rotated(name, weight)
        first = LearnedClipping.start(weight, shape.group_size)
        low, high = (self.start.take(f"{name}.clip_{e}", first.low.shape) for e in ("low", "high"))
        if low is not None and high is not None:
            return LearnedClipping(low, high)
        if self.learning.init == "minmax":
            return first
        square = inputs[name].square
        for fold_name, fold in self.folds.items():
            # A fold divides the input of its readers; a rotary one scales rows instead.
            if name in fold.readers and fold.kind != "rotary":
                scale = self.log_scales[fold_name].detach().exp()
                per_column = scale if fold.reader_channels is None else scale[fold.reader_channels]
                square = square / per_column.square()
        error = partial(self.squared_error, name)
        square = self.rotated_squares(name, square)
        ratios = search_clipping(weight, square, shape, squared_error=error)
        return LearnedClipping.from_ratios(*ratios)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Returns the parameters with their learning rates."""
        moved = [*self.log_scales.values(), *self.shifts.values()]
        logits = [p for clipping in self.clipping.values() for p in clipping.parameters()]
        return [
            ParameterGroup(moved, self.learning.let_lr),
            ParameterGroup(logits, self.learning.lwc_lr),
        ]

    def values(self) -> list[Tensor]:
        """Returns a copy of all parameters, for `restore`."""
        return [p.detach().clone() for group in self.parameter_groups() for p in group.parameters]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Sets all parameters to what `values` returned."""
        parameters = [p for group in self.parameter_groups() for p in group.parameters]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)

    def folded(self) -> Tensors:
        """Returns the block's float tensors after folding, differentiable in the parameters."""
        scales = {name: log_scale.exp() for name, log_scale in self.log_scales.items()}
        return apply_folds(self.float_tensors, self.folds, scales, self.shifts)

    def grid(self, name: str, weight: Tensor) -> Grid:
        """Returns the grid of a linear's clipped ranges. weight: as `rotated` returns it"""
        if name not in self.clipping:
            return self.whole_grid(name, weight)
        return self.clipping[name].within(*self._ends(name, weight), self.shapes[name])

    def whole_grid(self, name: str, weight: Tensor) -> Grid:
        """Returns the grid of a linear's whole ranges. weight: as `rotated` returns it"""
        low, high = self._ends(name, weight)
        return grid_from_range(low, high, *self.shapes[name])

    def _ends(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns minimum and maximum of every group, (out, groups) each.

        They are computed once for a weight that no fold moves.
        """
        size = self.shapes[name].group_size
        constant = (self.float_tensors[f"{name}.weight"], self.constant_rotated.get(name))
        if not any(weight is each for each in constant):
            return extremes(weight, size)
        if name not in self._constant_ends:
            self._constant_ends[name] = extremes(weight, size)
        return self._constant_ends[name]

    def whole_range_error(self, name: str, weight: Tensor) -> Tensor:
        """Returns the squared error, (out, in), with whole ranges; 0 for a float weight."""
        if name not in self.shapes:
            return torch.zeros_like(weight)
        return self.squared_error(name, weight, self.whole_grid(name, weight))

    def forget(self) -> None:
        """Drops all parameters; the block is then rounded to nearest."""
        self.clipping, self.log_scales, self.shifts, self.folds = {}, {}, {}, {}

    def learned(self) -> Tensors:
        """Returns a copy of the parameters by name, from which a later run can start."""
        learned = {f"fold.{name}.log_scale": p for name, p in self.log_scales.items()}
        learned |= {f"fold.{name}.shift": p for name, p in self.shifts.items()}
        for name, clipping in self.clipping.items():
            learned[f"{name}.clip_low"] = clipping.low
            learned[f"{name}.clip_high"] = clipping.high
        return {name: p.detach().clone() for name, p in learned.items()}


def _can_help(fold: Fold, rounded: Sequence[str], attention: bool) -> bool:
    """Whether the scale of a fold can change a rounding error.

    rounded: the linears that are quantized.
    attention: whether attention rounds its queries and keys.
    """
    if fold.kind == "rotary":  # it scales whole rows, whose grids scale with them
        return attention
    return fold.kind in SCALED and not set(rounded).isdisjoint(fold.readers)
