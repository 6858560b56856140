"""OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137), weight-only.

Per block, two sets of parameters are learned by gradient descent through the rounding: how far each
group's range is clipped (LWC, section 3.2) and by how much channels are scaled between a layer and
the one before it (LET, section 3.3). The loss is the mean squared error between the float block fed
by the float stream and the quantized block fed by the quantized stream (equation 1). Nothing is
left at run time: scales are folded into norms and linears, ranges into the stored grid.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lowbit.blocks import BlockResult, BlockTask, Event, Fold, Stream
from lowbit.blocks.capture import call_block
from lowbit.blocks.folding import Tensors, apply_folds, load_changed, tensors_of
from lowbit.blocks.hessian import input_hessians
from lowbit.blocks.start import Start
from lowbit.blocks.statistics import ChannelStatistics, input_statistics
from lowbit.blocks.training import Fit, ParameterGroup, fit, mean_loss
from lowbit.methods.method import Method, signal_to_noise
from lowbit.methods.packing import pack, pack_with_feedback
from lowbit.solvers.clipping import LearnedClipping, search_clipping
from lowbit.solvers.equivalence import searched_scale, smooth_scale
from lowbit.solvers.gptq import OrderedFactor, ordered_factor
from lowbit.solvers.rounding import Grid, fake_quantize, minmax_grid


class OmniQuant(Method):
    """bits, group_size, symmetric: the grid, as in RTN. lwc, let: what is learned.

    aug_loss: adds the error against the float block on the quantized stream. epochs over all
    samples; batch: samples per step; lwc_lr, let_lr: AdamW's rates for logits and for logarithms of
    scales. alpha: of the initial scales. init: "minmax" as published, or "awq", a search for
    scales and clips so that a quarter of the epochs does. min_tokens: an expert that saw fewer
    calibration tokens is rounded to nearest and named in the report. rounding: "nearest" as
    published, or "gptq": with grid and scales learned, codes are chosen with feedback.
    """

    name: ClassVar[str] = "omniquant"
    per_linear: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric")
    learns: ClassVar[bool] = True

    bits: int = Field(4, ge=2, le=8)
    group_size: int | None = Field(None, ge=1)
    symmetric: bool = False
    lwc: bool = True
    let: bool = False
    aug_loss: bool = False
    epochs: int = Field(20, ge=0)
    batch: int = Field(1, ge=1)
    lwc_lr: float = Field(1e-2, gt=0)
    let_lr: float = Field(5e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    alpha: float = Field(0.5, ge=0, le=1)
    init: Literal["minmax", "awq"] = "minmax"
    rounding: Literal["nearest", "gptq"] = "nearest"
    damping: float = Field(0.01, gt=0)
    min_tokens: int = Field(64, ge=1)

    def streams(self) -> tuple[str, ...]:
        return ("float", "quantized")

    def rows(self) -> int:
        return self.batch

    def quantize(self, task: BlockTask) -> BlockResult:
        statistics = input_statistics(task.block, task.groups, task.streams["float"])
        starved = _starved(task, statistics, self.min_tokens)
        learner = _Learner(self, task, statistics, set(starved))
        targets = _targets(task, self.aug_loss)
        fitted = fit(
            learner.parameter_groups(),
            _loss(task, learner.tensors, targets),
            len(task.streams["quantized"]),
            self.epochs,
            task.log,
            self.weight_decay,
        )
        nearest = mean_loss(_loss(task, learner.nearest, targets), len(targets[0]))
        keep = fitted.after <= nearest
        if not keep:
            task.log(Event("warning", {"text": f"{task.name}: rounding to nearest was better"}))
            learner.forget()
        result = learner.result(self._factors(task, learner))
        result.report |= _report(fitted, nearest, keep, starved, statistics, task)
        return result

    def _factors(self, task: BlockTask, learner: "_Learner") -> dict[str, OrderedFactor]:
        """What GPTQ needs, by linear: the Hessians of the transformed block's inputs."""
        if self.rounding == "nearest":
            return {}
        folded = deepcopy(task.block)
        load_changed(folded, learner.folded())
        hessians = input_hessians(folded, task.groups, task.streams["quantized"])
        found: dict[str, OrderedFactor] = {}
        for group in task.groups:
            hessian = hessians[group.name]
            enough = hessian.tokens >= self.min_tokens
            factor = ordered_factor(hessian.matrix, self.damping, True) if enough else None
            if factor is not None:
                found |= dict.fromkeys(group.linears, factor)
        return found


class _Learner:
    """The parameters of one block, and the block's tensors as functions of them."""

    def __init__(
        self,
        method: OmniQuant,
        task: BlockTask,
        statistics: dict[str, ChannelStatistics],
        starved: set[str],
    ) -> None:
        self.method = method
        self.block = task.block
        self.float_tensors = tensors_of(task.block)
        self.linears = [name for group in task.groups for name in group.linears]
        self.settings = {name: method.at(f"{task.name}.{name}") for name in self.linears}
        self.start = Start(task)
        by_reader = {name: statistics[g.name] for g in task.groups for name in g.linears}
        seen = {name: s for name, s in by_reader.items() if s.tokens}
        self.folds: dict[str, Fold] = {}
        if method.let:
            # Not "rotary": a grid follows the scale of its row, so rounding sees nothing of it.
            self.folds = {f.name: f for f in task.folds if f.kind in ("norm", "rows")}
        # Learned as logarithms: positive whatever the optimiser does.
        self.log_scales = {
            name: nn.Parameter(self._first_log_scale(fold, seen))
            for name, fold in self.folds.items()
        }
        self.clipping: dict[str, LearnedClipping] = {}
        if method.lwc:
            folded = self.folded()
            self.clipping = {
                name: self._first_clipping(folded[f"{name}.weight"].detach(), seen, name)
                for name in self.linears
                if name not in starved or f"{name}.clip_low" in self.start
            }
        self.start.check_used()

    def _first_log_scale(self, fold: Fold, seen: dict[str, ChannelStatistics]) -> Tensor:
        started = self.start.take(f"fold.{fold.name}.log_scale", (fold.size,))
        if started is not None:
            return started
        if self.method.init == "awq":
            return searched_scale(fold, self.float_tensors, seen, self._round_to_nearest).log()
        return smooth_scale(fold, self.float_tensors, seen, self.method.alpha).log()

    def _first_clipping(
        self, weight: Tensor, seen: dict[str, ChannelStatistics], name: str
    ) -> LearnedClipping:
        method = self.settings[name]
        first = LearnedClipping.start(weight, method.group_size)
        low, high = (self.start.take(f"{name}.clip_{e}", first.low.shape) for e in ("low", "high"))
        if low is not None and high is not None:
            return LearnedClipping(low, high)
        if method.init == "minmax":
            return first
        statistics = seen[name]
        square = statistics.square
        for fold_name, fold in self.folds.items():  # folding has divided this linear's input
            if name in fold.readers:
                scale = self.log_scales[fold_name].detach().exp()
                per_column = scale if fold.reader_channels is None else scale[fold.reader_channels]
                square = square / per_column.square()
        ratios = search_clipping(weight, square, method.bits, method.group_size, method.symmetric)
        return LearnedClipping.from_ratios(*ratios)

    def parameter_groups(self) -> list[ParameterGroup]:
        logits = [p for clipping in self.clipping.values() for p in clipping.parameters()]
        return [
            ParameterGroup(list(self.log_scales.values()), self.method.let_lr),
            ParameterGroup(logits, self.method.lwc_lr),
        ]

    def folded(self) -> Tensors:
        """The block's float tensors after the transformation."""
        scales = {name: log_scale.exp() for name, log_scale in self.log_scales.items()}
        return apply_folds(self.float_tensors, self.folds, scales)

    def grid(self, name: str, weight: Tensor) -> Grid:
        method = self.settings[name]
        if name not in self.clipping:
            return minmax_grid(weight, method.bits, method.group_size, method.symmetric)
        return self.clipping[name].grid(weight, method.bits, method.group_size, method.symmetric)

    def tensors(self) -> Tensors:
        """What the quantized block runs with, differentiable in all parameters."""
        tensors = self.folded()
        for name in self.linears:
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = fake_quantize(weight, self.grid(name, weight))
        return tensors

    def nearest(self) -> Tensors:
        """The same block rounded to nearest: the baseline."""
        tensors = dict(self.float_tensors)
        for name in self.linears:
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = self._round_to_nearest(name, weight)
        return tensors

    def _round_to_nearest(self, name: str, weight: Tensor) -> Tensor:
        method = self.settings.get(name)
        if method is None:  # a reader that stays float
            return weight
        grid = minmax_grid(weight, method.bits, method.group_size, method.symmetric)
        return fake_quantize(weight, grid)

    def forget(self) -> None:
        """Back to rounding to nearest."""
        self.clipping, self.log_scales, self.folds = {}, {}, {}

    @torch.no_grad()
    def result(self, factors: Mapping[str, OrderedFactor]) -> BlockResult:
        """The packed block; linears in `factors` are rounded with feedback."""
        tensors = self.folded()
        result = BlockResult({}, learned=self._learned(), report={"linears": {}})
        for name in self.linears:
            weight = tensors.pop(f"{name}.weight")
            bias, grid = tensors.pop(f"{name}.bias", None), self.grid(name, weight)
            if name in factors:
                packed, _ = pack_with_feedback(weight, bias, grid, factors[name])
            else:
                packed = pack(weight, bias, grid)
            result.linears[name] = packed
            error = signal_to_noise(weight, packed)
            result.report["linears"][name] = {"signal_to_noise_db": round(error, 2)}
        for name, tensor in tensors.items():
            if not torch.equal(tensor, self.float_tensors[name]):
                result.tensors[name] = tensor
        return result

    def _learned(self) -> Tensors:
        learned = {f"fold.{name}.log_scale": p.detach() for name, p in self.log_scales.items()}
        for name, clipping in self.clipping.items():
            learned[f"{name}.clip_low"] = clipping.low.detach()
            learned[f"{name}.clip_high"] = clipping.high.detach()
        return learned


def _targets(task: BlockTask, aug_loss: bool) -> list[Stream]:
    """The float block's outputs on the float stream, and for aug_loss on the quantized one."""
    streams = ["float", "quantized"] if aug_loss else ["float"]
    return [task.streams[name].map(lambda batch: call_block(task.block, batch)) for name in streams]


def _loss(
    task: BlockTask, tensors: Callable[[], Tensors], targets: Sequence[Stream]
) -> Callable[[int], Tensor]:
    """The loss of one batch as a function of its number."""
    quantized = task.streams["quantized"]

    def loss(index: int) -> Tensor:
        batch = quantized[index]
        out = functional_call(task.block, tensors(), (batch.hidden,), dict(batch.kwargs))
        out = out[0] if isinstance(out, tuple) else out
        errors = [functional.mse_loss(out, target[index].hidden) for target in targets]
        return torch.stack(errors).sum()

    return loss


def _starved(
    task: BlockTask, statistics: dict[str, ChannelStatistics], min_tokens: int
) -> dict[str, int]:
    """Linears of experts that saw too few tokens, with how many they saw."""
    return {
        linear: statistics[group.name].tokens
        for group in task.groups
        for linear in group.linears
        if statistics[group.name].tokens < min_tokens
    }


def _report(
    fitted: Fit,
    nearest: float,
    keep: bool,
    starved: dict[str, int],
    statistics: dict[str, ChannelStatistics],
    task: BlockTask,
) -> dict[str, Any]:
    report: dict[str, Any] = {"training": fitted.report(), "loss_rtn": nearest}
    report["loss_before"], report["loss_after"] = fitted.before, fitted.after
    tokens = {group.name: statistics[group.name].tokens for group in task.groups}
    if len(set(tokens.values())) > 1:
        report["tokens"] = tokens
    if starved:
        report["rounded_to_nearest"] = starved
    if not keep:
        report["loss_after"] = nearest
        report["fell_back"] = "nothing learned was better than rounding to nearest"
    return report
