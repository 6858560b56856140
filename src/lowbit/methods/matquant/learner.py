"""The learned parameters of one block, and the masters and layers that are made of them."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.blocks import BlockTask
from lowbit.blocks.folding import Tensors, load_changed
from lowbit.blocks.statistics import ChannelStatistics
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.nested import NestedLinear
from lowbit.kernels.slicing import MASTER_BITS
from lowbit.methods.learned import packed_block
from lowbit.methods.matquant.joint import SliceSteps, slice_steps, weighted_mean
from lowbit.methods.matquant.master import Master
from lowbit.methods.matquant.packing import (
    Slices,
    pack_nested,
    packed_plain,
    sliced_report,
    stored_grid,
)
from lowbit.methods.matquant.slices import fake_slice, master_codes
from lowbit.methods.packing import as_stored
from lowbit.methods.result import NOT_POSITIVE_DEFINITE, BlockResult, too_few_tokens
from lowbit.run_report import BlockReport, LinearReport
from lowbit.solvers.block_learner import BlockLearner
from lowbit.solvers.clipping import rounding_error
from lowbit.solvers.correction import Target
from lowbit.solvers.gptq import OrderedFactor
from lowbit.solvers.learned_rounding import RoundedWeight
from lowbit.solvers.rounding import Grid, GridShape, grouped

if TYPE_CHECKING:
    from lowbit.methods.matquant.method import MatQuant

ATTENTION = ("attn", "attention")  # found in transformers' names of attention modules


class Learner(BlockLearner):
    """The learned parameters of one block, and the master that they give."""

    def __init__(
        self,
        method: "MatQuant",
        task: BlockTask,
        statistics: dict[str, ChannelStatistics],
        unclipped: set[str],
    ) -> None:
        self.method = method
        names = [name for group in task.groups for name in group.linears]
        settings = {name: method.at(f"{task.name}.{name}") for name in names}
        shapes = {
            name: GridShape(MASTER_BITS, s.group_size, s.symmetric) for name, s in settings.items()
        }
        self.settings = {n: s for n, s in settings.items() if method.scope == "all" or _is_ffn(n)}
        if not self.settings:
            raise ValueError(
                f'{task.name} has no linear outside attention, which scope "ffn" needs: set scope '
                'to "all"'
            )
        self.unclipped = unclipped
        self.rounded: Tensors = {}  # what learned codes start from; not where few tokens were seen
        outside = set(settings) - set(self.settings)
        learning = method.learning(codes=method.rounding == "learned")
        super().__init__(task, statistics, unclipped | outside, learning, shapes)

    def squared_error(self, name: str, weight: Tensor, grid: Grid) -> Tensor:
        """Returns the weighted sum of the squared errors of all widths: (out, in)."""
        if name not in self.settings:
            return rounding_error(weight, grid)
        extra, codes = self.settings[name].extra_precision, master_codes(weight, grid)
        total = torch.zeros_like(weight)
        for width, share in self.method.weight_of().items():
            total += share * (fake_slice(weight, grid, codes, width, extra) - weight).square()
        return total

    def master(self) -> Master:
        """Returns the learned master, differentiable in all parameters."""
        return self._master(self.folded(), self.grid)

    def nearest(self) -> Master:
        """Returns the master of rounding to nearest at 8 bits; its slices are the baseline."""
        return self._master(self.float_tensors, self.whole_grid)

    @torch.no_grad()
    def packed(self, layers: Mapping[str, QuantizedLinear]) -> Master:
        """Returns the master with the grids and codes of the packed layers."""
        made = self.master()
        grids, codes = dict(made.grids), dict(made.codes)
        own: dict[tuple[str, int], Grid] = {}
        for name, layer in layers.items():
            if isinstance(layer, NestedLinear):
                grids[name] = as_stored(grids[name], layer)
                codes[name] = grouped(layer.master, grids[name].group_size).to(torch.int16)
                own |= {(name, w): stored_grid(grids[name], layer, w) for w in layer.spec.own_grids}
        return replace(made, grids=grids, codes=codes, own=own)

    def _master(self, tensors: Tensors, grid: Callable[[str, Tensor], Grid]) -> Master:
        grids = {name: grid(name, tensors[f"{name}.weight"]) for name in self.linears}
        codes = {
            name: master_codes(tensors[f"{name}.weight"], grids[name]) for name in self.settings
        }
        extra = {name: settings.extra_precision for name, settings in self.settings.items()}
        return Master(tensors, grids, codes, extra)

    def result(
        self,
        factors: Mapping[str, OrderedFactor],
        learned: bool,
        fallbacks: Mapping[str, str],
    ) -> BlockResult:
        """Packs the block.

        factors: the factored Hessians of the linears to round jointly for all widths, by name; all
            others are rounded to nearest.
        learned: whether the grids were learned or searched for the widths (those of linears that
            saw too few tokens never are).
        fallbacks: the fallback sentences of linears, by name.
        """
        weights = self.method.weight_of()

        def packed(
            name: str, weight: Tensor, bias: Tensor | None, _: object
        ) -> tuple[QuantizedLinear, LinearReport]:
            if name not in self.settings:
                return packed_plain(
                    weight, bias, self.grid(name, weight), self.tokens[name], fallbacks.get(name)
                )
            made = learned and name not in self.unclipped
            targets = dict.fromkeys(weights, Target(weight, None))
            nested = self._nested(name, weight, bias, factors.get(name), made, targets)
            fallback = fallbacks.get(name)
            return nested, sliced_report(weight, nested, targets, self.tokens[name], fallback)

        return packed_block(self, packed)

    def matched(self, task: BlockTask, learned: bool, fallbacks: Mapping[str, str]) -> BlockResult:
        """Packs the block by joint rounding, so that its output matches the float model's.

        learned, fallbacks: as in `result`.
        """
        block = deepcopy(task.block)
        load_changed(block, self.folded())
        weights = self.method.weight_of()
        shares = {width: weight / sum(weights.values()) for width, weight in weights.items()}
        factors: dict[str, OrderedFactor | None] = {}

        def packed(
            name: str, weight: Tensor, bias: Tensor | None, step: SliceSteps | None
        ) -> tuple[QuantizedLinear, LinearReport]:
            assert step is not None
            if name not in self.settings:
                return packed_plain(
                    weight, bias, self.grid(name, weight), self.tokens[name], fallbacks.get(name)
                )
            if step.group.name not in factors:  # the groups come one after another
                factors.clear()
                factors[step.group.name] = step.factor(shares, self.method.damping)
            factor, fallback = factors[step.group.name], fallbacks.get(name)
            if fallback is None and step.tokens < self.method.min_tokens:
                fallback = too_few_tokens(step.tokens)
            if fallback is None and factor is None:
                fallback = NOT_POSITIVE_DEFINITE
            if fallback is None:
                targets = step.targets(weight, self.method.damping)
                mean = weighted_mean(targets, shares)
            else:
                factor, mean = None, weight
                targets = dict.fromkeys(weights, Target(weight, None))
            made = learned and name not in self.unclipped
            nested = self._nested(name, mean, bias, factor, made, targets)
            error = step.output_error(name, weight, nested)
            tokens = self.tokens[name]
            return nested, sliced_report(mean, nested, targets, tokens, fallback, error)

        streams = {width: self.method.stream_of(width) for width in self.method.widths}
        return packed_block(self, packed, lambda made: slice_steps(task, block, streams, made))

    def rounded_weights(self, layers: Mapping[str, QuantizedLinear]) -> dict[str, RoundedWeight]:
        """Returns the weights of packed layers whose codes can be learned, by name."""
        grids = self.packed(layers).grids
        return {
            name: RoundedWeight(self.rounded[name], grids[name], layer.scale.dtype)
            for name, layer in layers.items()
            if name in self.rounded and isinstance(layer, NestedLinear)
        }

    @torch.no_grad()
    def put_learned(self, result: BlockResult, weights: Mapping[str, RoundedWeight]) -> None:
        """Puts layers with learned codes into a result. weights: by the name of the linear."""
        folded, reports = self.folded(), dict(result.report.linears)
        for name, learned in weights.items():
            weight, bias = learned.weight, result.linears[name].bias
            layer = self._packed(name, weight, bias, learned.grid, None, True, {})
            result.linears[name] = layer
            wanted = Target(folded[f"{name}.weight"], None)
            targets = dict.fromkeys(self.method.widths, wanted)
            tokens, fallback = self.tokens[name], reports[name].fallback
            reports[name] = sliced_report(wanted.weight, layer, targets, tokens, fallback)
            result.learned |= {f"{name}.{part}": t for part, t in learned.learned().items()}
        result.report = BlockReport(linears=reports)

    def _nested(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        factor: OrderedFactor | None,
        learned: bool,
        targets: Mapping[int, Target],
    ) -> NestedLinear:
        """Packs a linear that is sliced.

        weight: (out, in), what the grid is made for.
        factor: the factored Hessian; None: the weight is rounded to nearest.
        learned: whether its grid was learned or searched for the widths.
        targets: what each width is rounded for.
        """
        weight, grid = self.earlier.get(name) or (weight, self.grid(name, weight))
        layer = self._packed(name, weight, bias, grid, factor, learned, targets)
        if self.method.rounding == "learned" and self.tokens[name] >= self.method.min_tokens:
            self.rounded[name] = weight if factor is None else layer.dequantize()
        return layer

    def _packed(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        grid: Grid,
        factor: OrderedFactor | None,
        learned: bool,
        targets: Mapping[int, Target],
    ) -> NestedLinear:
        own = self.method.slice_grids if self.method.rounding == "joint" else ()
        slices = Slices(self.method.weight_of(), self.settings[name].extra_precision, own)
        wanted = {width: target.weight for width, target in targets.items()}
        return pack_nested(weight, bias, grid, factor, slices, learned, wanted)


def _is_ffn(linear: str) -> bool:
    return not any(name in part for part in linear.split(".") for name in ATTENTION)
