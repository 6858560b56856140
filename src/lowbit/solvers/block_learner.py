"""What OmniQuant learns of a block: how ranges are clipped, and how channels are scaled.

OmniQuant (arXiv 2308.13137), sections 3.2 and 3.3. The methods that use it decide which rounding
the grids are for, and what the loss is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.blocks import BlockTask, Fold
from lowbit.blocks.folding import Tensors, apply_folds, tensors_of
from lowbit.blocks.start import Start
from lowbit.blocks.statistics import ChannelStatistics, tokens_by_linear
from lowbit.blocks.training import ParameterGroup
from lowbit.solvers.clipping import LearnedClipping, search_clipping
from lowbit.solvers.equivalence import middle_shift, searched_scale, smooth_scale
from lowbit.solvers.rounding import Grid, GridShape, fake_quantize, minmax_grid

Statistics = Mapping[str, ChannelStatistics]  # by the name of a group


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What is learned, and how.

    lwc: whether clips are learned, at the rate lwc_lr.
    let: whether scales of channels are learned, at the rate let_lr.
    alpha, init: where scales and clips begin.
    inputs: whether what the linears and attentions read is rounded too. Then `let` also shifts
        channels, where biases can take it up, and scales queries against keys.
    """

    lwc: bool
    let: bool
    lwc_lr: float
    let_lr: float
    alpha: float
    init: Literal["minmax", "awq"]
    inputs: bool = False


class BlockLearner:
    """The parameters of one block, and its float tensors and grids as functions of them.

    shapes: of the grid of every linear that is quantized. unclipped: linears whose whole range is
    kept, unless an earlier run has clipped them.
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
        self.start = Start(task)
        by_reader = {name: statistics[g.name] for g in task.groups for name in g.linears}
        seen = {name: s for name, s in by_reader.items() if s.tokens}
        self.folds: dict[str, Fold] = {}
        if learning.let:
            attends = learning.inputs and bool(task.attentions)
            self.folds = {f.name: f for f in task.folds if _is_seen(f, self.linears, attends)}
        self.shifts = {
            name: nn.Parameter(self._first_shift(fold, seen))
            for name, fold in self.folds.items()
            if learning.inputs and fold.shiftable
        }
        # Learned as logarithms: positive whatever the optimiser does.
        self.log_scales = {
            name: nn.Parameter(self._first_log_scale(fold, seen))
            for name, fold in self.folds.items()
        }
        self.clipping: dict[str, LearnedClipping] = {}
        if learning.lwc:
            folded = self.folded()
            self.clipping = {
                name: self._first_clipping(folded[f"{name}.weight"].detach(), seen, name)
                for name in self.linears
                if name not in unclipped or f"{name}.clip_low" in self.start
            }
        self.start.check_used()

    def rounded(self, name: str, weight: Tensor, grid: Grid) -> Tensor:
        """The rounding that initial scales and clips are searched for."""
        return fake_quantize(weight, grid)

    def _first_shift(self, fold: Fold, seen: Statistics) -> Tensor:
        started = self.start.take(f"fold.{fold.name}.shift", (fold.size,))
        if started is not None:
            return started
        device = self.float_tensors[f"{fold.source}.weight"].device
        if self.learning.init == "awq":  # its search is for inputs that stay where they are
            return torch.zeros(fold.size, device=device)
        return middle_shift(fold, seen, device)

    def _first_log_scale(self, fold: Fold, seen: Statistics) -> Tensor:
        started = self.start.take(f"fold.{fold.name}.log_scale", (fold.size,))
        if started is not None:
            return started
        if self.learning.init == "awq":
            return searched_scale(fold, self.float_tensors, seen, self.round_to_nearest).log()
        shift = self.shifts[fold.name].detach() if fold.name in self.shifts else 0.0
        return smooth_scale(fold, self.float_tensors, seen, self.learning.alpha, shift).log()

    def _first_clipping(self, weight: Tensor, seen: Statistics, name: str) -> LearnedClipping:
        shape = self.shapes[name]
        first = LearnedClipping.start(weight, shape.group_size)
        low, high = (self.start.take(f"{name}.clip_{e}", first.low.shape) for e in ("low", "high"))
        if low is not None and high is not None:
            return LearnedClipping(low, high)
        if self.learning.init == "minmax":
            return first
        square = seen[name].square
        for fold_name, fold in self.folds.items():  # folding has divided this linear's input
            if name in fold.readers:
                scale = self.log_scales[fold_name].detach().exp()
                per_column = scale if fold.reader_channels is None else scale[fold.reader_channels]
                square = square / per_column.square()
        ratios = search_clipping(
            weight, square, shape, rounded=lambda w, grid: self.rounded(name, w, grid)
        )
        return LearnedClipping.from_ratios(*ratios)

    def parameter_groups(self) -> list[ParameterGroup]:
        moved = [*self.log_scales.values(), *self.shifts.values()]
        logits = [p for clipping in self.clipping.values() for p in clipping.parameters()]
        return [
            ParameterGroup(moved, self.learning.let_lr),
            ParameterGroup(logits, self.learning.lwc_lr),
        ]

    def folded(self) -> Tensors:
        """The block's float tensors after the transformation."""
        scales = {name: log_scale.exp() for name, log_scale in self.log_scales.items()}
        return apply_folds(self.float_tensors, self.folds, scales, self.shifts)

    def grid(self, name: str, weight: Tensor) -> Grid:
        if name not in self.clipping:
            return self.whole_grid(name, weight)
        return self.clipping[name].grid(weight, self.shapes[name])

    def whole_grid(self, name: str, weight: Tensor) -> Grid:
        """Of the range as it is."""
        return minmax_grid(weight, *self.shapes[name])

    def round_to_nearest(self, name: str, weight: Tensor) -> Tensor:
        """A linear's weight on the grid of its whole range; a reader that stays float as it is."""
        if name not in self.shapes:
            return weight
        return self.rounded(name, weight, self.whole_grid(name, weight))

    def forget(self) -> None:
        """Back to rounding to nearest."""
        self.clipping, self.log_scales, self.shifts, self.folds = {}, {}, {}, {}

    def learned(self) -> Tensors:
        """What a later run can start from."""
        learned = {f"fold.{name}.log_scale": p.detach() for name, p in self.log_scales.items()}
        learned |= {f"fold.{name}.shift": p.detach() for name, p in self.shifts.items()}
        for name, clipping in self.clipping.items():
            learned[f"{name}.clip_low"] = clipping.low.detach()
            learned[f"{name}.clip_high"] = clipping.high.detach()
        return learned


def _is_seen(fold: Fold, rounded: Sequence[str], attends: bool) -> bool:
    """Whether something that is rounded sees a fold's scale. attends: attention rounds."""
    if fold.kind == "rotary":  # not the weights: a row's grid follows its scale
        return attends
    return fold.kind in ("norm", "values") and not set(rounded).isdisjoint(fold.readers)
