"""OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137), for weights alone or with activations.

For each block, two sets of parameters are learned by gradient descent through the rounding:
learnable weight clipping (LWC, section 3.2) clips the range of each group, and learnable equivalent
transformation (LET, section 3.3) scales channels between a layer and the one before it. The loss is
the mean squared error between two outputs (equation 1): the float block's for inputs that came
through float blocks, and the quantized block's for inputs that came through quantized blocks.
Nothing learned remains at run time: scales
are folded into norms and linears, and ranges are part of the stored grid.

With `activation_bits`, each quantized linear rounds its input, and attention its queries, keys and
values, token by token when the model runs (section 4.1). LET then also shifts channels where biases
can absorb the shift (equation 3) and scales queries against keys (equation 5).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from lowbit.blocks import BlockTask, Stream
from lowbit.blocks.capture import call_block
from lowbit.blocks.folding import Tensors, load_changed
from lowbit.blocks.statistics import ChannelStatistics, input_statistics, tokens_by_linear
from lowbit.blocks.training import fit, mean_loss
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.reading import Reading
from lowbit.formats.uniform import UniformLinear
from lowbit.methods.activations import ActivationMethod, Readings
from lowbit.methods.damping import damping_share
from lowbit.methods.learned import NEAREST_BETTER, LearningMethod, keep_if_better, packed_block
from lowbit.methods.matching import Match, Step, match_field, steps
from lowbit.methods.packing import pack, pack_with_feedback
from lowbit.methods.result import (
    NOT_POSITIVE_DEFINITE,
    BlockResult,
    signal_to_noise,
    too_few_tokens,
    trained_report,
    warn_of_hessians,
)
from lowbit.run_report import LinearReport
from lowbit.solvers.block_learner import BlockLearner
from lowbit.solvers.correction import Target
from lowbit.solvers.gptq import OrderedFactor, ordered_factor
from lowbit.solvers.rounding import Grid, fake_quantize


class OmniQuant(LearningMethod, ActivationMethod):
    """Learns clipping ranges and channel scales, block by block.

    Source: OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137). For weights alone, or for weights
    and activations. Nothing of what is learned costs time when the model runs: ranges are part of
    the stored grid, scales are folded into norms and neighbouring linears.
    """

    name: ClassVar[str] = "omniquant"
    rough: ClassVar[Mapping[str, Any]] = {
        **{"epochs": 0, "let": False, "aug_loss": False, "match": "self"}
    }

    rounding: Literal["nearest", "gptq"] = Field(
        "gptq",
        description='How codes are chosen on the learned grid: "nearest" as published, or "gptq", '
        "column by column with the error fed into the columns left.",
    )

    match: Match = match_field()

    def starts_from(self) -> Literal["minmax", "awq"]:
        return "minmax" if self.init == "auto" and self.activation_bits else super().starts_from()

    def matches_float(self) -> bool:
        return self.rounding == "gptq" and self.match == "float"

    def streams(self) -> tuple[str, ...]:
        return ("float", "quantized")

    def quantize(self, task: BlockTask) -> BlockResult:
        readings = self.readings(task, "float")
        task = readings.task
        statistics = input_statistics(task.block, task.groups, task.streams["float"])
        fallbacks = self.fallbacks(tokens_by_linear(task.groups, statistics))
        learner = _Learner(self, readings, statistics, set(fallbacks))
        targets = _targets(task, self.aug_loss)
        float_task, task = task, replace(task, block=readings.rounding_block())
        start = learner.values()
        fitted = fit(
            learner.parameter_groups(),
            _loss(task, learner.tensors, targets),
            len(task.streams["quantized"]),
            self.epochs,
            task.log,
            self.weight_decay,
        )
        nearest = mean_loss(_loss(task, learner.nearest, targets), len(targets[0]))
        keep = keep_if_better(learner, task, fitted.after, nearest)
        if self.rounding == "nearest":
            result, after = learner.result({}, fallbacks), fitted.after if keep else nearest
        else:
            tries = [start, learner.values()] if keep and fitted.best_epoch else [learner.values()]
            result, after = self._with_feedback(
                task, learner, float_task, fallbacks, targets, tries
            )
        warn_of_hessians(task, result.report.linears)
        reasons = [] if keep else [NEAREST_BETTER]
        if readings.fallback is not None:
            reasons.append(readings.fallback)
        result.report = trained_report(result.report.linears, fitted, nearest, after, reasons)
        return result

    def _with_feedback(
        self,
        task: BlockTask,
        learner: "_Learner",
        float_task: BlockTask,
        fallbacks: Mapping[str, str],
        targets: Sequence[Stream],
        tries: Sequence[Sequence[Tensor]],
    ) -> tuple[BlockResult, float]:
        """Rounds the block with error feedback; returns the best result and its loss.

        Values that were learned with the nearest codes are not always good for codes with feedback.
        At 2 bits the perplexity of tinystories-656k was 109.8 with the initial values in all
        blocks, 110.3 with the learned ones, and 107.5 with the better of both in each block.

        task, float_task: the task, with a block that rounds its inputs and with one that does not.
        tries: the values of the learned parameters to try.
        """
        found: list[tuple[float, BlockResult]] = []
        for values in tries:
            learner.restore(values)
            if self.match == "float":
                result = learner.matched(float_task, fallbacks)
            else:
                readings = learner.readings.linears
                factors = self.factors(task, learner, {"quantized": 1.0}, readings)
                failed = [n for n in learner.linears if n not in factors and n not in fallbacks]
                sentences = {**fallbacks, **dict.fromkeys(failed, NOT_POSITIVE_DEFINITE)}
                result = learner.result(factors, sentences)
            found.append((_fixed_loss(task, learner.packed(result.linears), targets), result))
        after, result = min(found, key=lambda each: each[0])
        return result, after


class _Learner(BlockLearner):
    """The learned parameters of one block, and its weights rounded to the grids that they give."""

    def __init__(
        self,
        method: OmniQuant,
        readings: Readings,
        statistics: dict[str, ChannelStatistics],
        unclipped: set[str],
    ) -> None:
        self.method, self.readings, task = method, readings, readings.task
        shapes = {name: method.at(f"{task.name}.{name}").grid_shape for name in readings.linears}
        rounds = any(reading.activation for reading in readings.linears.values())
        learning = method.learning(inputs=rounds)
        task = replace(task, attentions=tuple(readings.attentions))
        super().__init__(task, statistics, unclipped, learning, shapes)

    def rotated(self, name: str, weight: Tensor) -> Tensor:
        return self.readings.linears[name].rotate_weight(weight)

    def rotated_squares(self, name: str, squares: Tensor) -> Tensor:
        """Returns the mean over all channels, on each of which a rotation puts a part of all."""
        rotates = self.readings.linears[name].rotation is not None
        return squares.mean().expand_as(squares) if rotates else squares

    def whole_range_error(self, name: str, weight: Tensor) -> Tensor:
        if name not in self.shapes or self.readings.linears[name].rotation is None:
            return super().whole_range_error(name, weight)
        return (self._rounded(name, weight, self.whole_grid) - weight).square()

    def _rounded(self, name: str, weight: Tensor, grid: Callable[[str, Tensor], Grid]) -> Tensor:
        """Returns a weight (out, in) rounded to a grid, if need be in its rotated form."""
        reading, rotated = self.readings.linears[name], self.rotated(name, weight)
        return reading.restore_weight(fake_quantize(rotated, grid(name, rotated)))

    def tensors(self) -> Tensors:
        """Returns the tensors of the quantized block, differentiable in the learned parameters."""
        tensors = self.folded()
        for name in self.linears:
            tensors[f"{name}.weight"] = self._rounded(name, tensors[f"{name}.weight"], self.grid)
        return tensors

    def nearest(self) -> Tensors:
        """Returns the tensors of the block rounded to nearest, the baseline."""
        tensors = dict(self.float_tensors)
        for name in self.linears:
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = self._rounded(name, weight, self.whole_grid)
        return tensors

    @torch.no_grad()
    def packed(self, layers: Mapping[str, QuantizedLinear]) -> Tensors:
        """Returns the tensors of the quantized block, with the weights of the packed layers."""
        weights = {f"{name}.weight": layer.dequantize() for name, layer in layers.items()}
        return self.folded() | weights

    def result(
        self,
        factors: Mapping[str, OrderedFactor],
        fallbacks: Mapping[str, str],
    ) -> BlockResult:
        """Packs the block.

        factors: the factored Hessians of the linears to round with error feedback, by name; all
            others are rounded to nearest.
        fallbacks: the fallback sentences of linears, by name.
        """

        def packed(
            name: str, weight: Tensor, bias: Tensor | None, _: object
        ) -> tuple[UniformLinear, LinearReport]:
            rotated = self.rotated(name, weight)
            grid = self.grid(name, rotated)
            if name in factors:
                layer, _ = pack_with_feedback(rotated, bias, grid, factors[name])
            else:
                layer = pack(rotated, bias, grid)
            layer = self.readings.read_by(name, layer)
            return layer, LinearReport(
                signal_to_noise_db=signal_to_noise(weight, layer),
                tokens=self.tokens[name],
                fallback=fallbacks.get(name),
            )

        return self.readings.complete(packed_block(self, packed))

    @torch.no_grad()
    def matched(self, task: BlockTask, fallbacks: Mapping[str, str]) -> BlockResult:
        """Packs the block with error feedback, so that its output matches the float model's.

        fallbacks: the fallback sentences of the linears that saw too few tokens, by name.
        """
        block = deepcopy(task.block)
        load_changed(block, self.folded())
        factors: dict[tuple[str, Reading], OrderedFactor | None] = {}

        def packed(
            name: str, weight: Tensor, bias: Tensor | None, step: Step | None
        ) -> tuple[UniformLinear, LinearReport]:
            assert step is not None
            damping = damping_share(self.method.damping, step.hessian.tokens, weight.shape[1])
            reading = self.readings.linears[name]
            key, fallback = (step.group.name, reading), fallbacks.get(name)
            if key not in factors:
                matrix = reading.rotate_hessian(step.hessian.matrix)
                if any(group != step.group.name for group, _ in factors):
                    factors.clear()  # the groups come one after another
                factors[key] = ordered_factor(matrix, damping, True)
            factor = factors[key]
            if fallback is None and step.hessian.tokens < self.method.min_tokens:
                fallback = too_few_tokens(step.hessian.tokens)
            if fallback is None and factor is None:
                fallback = NOT_POSITIVE_DEFINITE
            if fallback is not None or factor is None:
                target = Target(weight, None)
                rotated = self.rotated(name, weight)
                layer = pack(rotated, bias, self.grid(name, rotated))
            else:
                target = step.target(weight, damping)
                rotated = self.rotated(name, target.weight)
                grid = self.grid(name, rotated)
                layer, _ = pack_with_feedback(rotated, bias, grid, factor)
            layer = self.readings.read_by(name, layer)
            return layer, LinearReport(
                signal_to_noise_db=signal_to_noise(target.weight, layer),
                output_error=step.output_error(name, weight, layer),
                correction=target.strength,
                tokens=self.tokens[name],
                fallback=fallback,
            )

        attention, seen = self.readings.attentions, self.readings.seen

        def in_order(made: Mapping[str, QuantizedLinear]) -> Iterator[Step]:
            return steps(task, "float", "quantized", made, block, attention, seen)

        return self.readings.complete(packed_block(self, packed, in_order))


def _targets(task: BlockTask, aug_loss: bool) -> list[Stream]:
    """Returns the float block's outputs for the "float" stream of hidden states.

    With aug_loss also its outputs for the "quantized" stream.
    """
    streams = ["float", "quantized"] if aug_loss else ["float"]
    return [task.streams[name].map(lambda batch: call_block(task.block, batch)) for name in streams]


def _fixed_loss(task: BlockTask, tensors: Tensors, targets: Sequence[Stream]) -> float:
    """Returns the mean loss of the block with these tensors."""
    return mean_loss(_loss(task, lambda: tensors, targets), len(targets[0]))


def _loss(
    task: BlockTask, tensors: Callable[[], Tensors], targets: Sequence[Stream]
) -> Callable[[int], Tensor]:
    """Returns a function that computes the loss of one batch, given its index."""
    quantized = task.streams["quantized"]

    def loss(index: int) -> Tensor:
        batch = quantized[index]
        out = functional_call(task.block, tensors(), (batch.hidden,), dict(batch.kwargs))
        out = out[0] if isinstance(out, tuple) else out
        errors = [functional.mse_loss(out, target[index].hidden) for target in targets]
        return torch.stack(errors).sum()

    return loss
