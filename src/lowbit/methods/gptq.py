"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323): rounds to a uniform grid with error feedback.

Hessians are computed from the inputs that the already quantized blocks produce. All grids are fixed
before rounding begins (static groups), so that act_order needs no index of groups at run time.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from lowbit.blocks import BlockTask
from lowbit.blocks.hessian import Hessian
from lowbit.formats.reading import Reading
from lowbit.formats.uniform import UniformLinear
from lowbit.methods.activations import ActivationMethod, Readings
from lowbit.methods.damping import Damping, damping_field, damping_share
from lowbit.methods.matching import Match, Step, match_field, steps, streams_of
from lowbit.methods.output_feedback import (
    OUTPUT_NOT_POSITIVE_DEFINITE,
    output_feedback_field,
    output_hessian,
)
from lowbit.methods.packing import pack, pack_with_feedback
from lowbit.methods.result import (
    NOT_POSITIVE_DEFINITE,
    BlockResult,
    signal_to_noise,
    too_few_tokens,
    warn_of_hessians,
)
from lowbit.methods.shared import Shared
from lowbit.run_report import BlockReport, LinearReport
from lowbit.solvers.clipping import clipped_grid
from lowbit.solvers.correction import Target
from lowbit.solvers.feedback import TILE
from lowbit.solvers.gptq import OrderedFactor, ordered_factor
from lowbit.solvers.rounding import Grid, minmax_grid


class GPTQ(ActivationMethod):
    """Rounds column by column and feeds each error into the columns left.

    Source: GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323). Hessians are those of the
    inputs that the already quantized blocks produce.
    """

    name: ClassVar[str] = "gptq"
    per_linear: ClassVar[tuple[str, ...]] = (*ActivationMethod.per_linear, "clip")
    rough: ClassVar[Mapping[str, Any]] = {"match": "self", "output_feedback": False}

    act_order: bool = Field(
        True, description="Whether the columns whose inputs are largest are rounded first."
    )
    damping: Damping = damping_field()
    clip: bool = Field(
        True,
        description="Whether the range of each group is searched for the least error under the "
        "Hessian's diagonal; False: the whole range is kept.",
    )
    min_tokens: int = Field(
        64,
        ge=1,
        description="Calibration tokens that an expert must see; one that saw fewer is rounded to "
        "nearest and named in the report.",
    )

    match: Match = match_field()
    output_feedback: bool = output_feedback_field()

    def needs_output_hessians(self) -> bool:
        return self.output_feedback

    def matches_float(self) -> bool:
        return self.match == "float"

    def streams(self) -> tuple[str, ...]:
        return streams_of(self.match, "quantized")

    def quantize(self, task: BlockTask) -> BlockResult:
        result, reports = BlockResult(), dict[str, LinearReport]()
        readings = self.readings(task, self.streams()[0])
        task = readings.task
        for step in self._steps(task, readings, result):
            weights = {n: task.block.get_parameter(f"{n}.weight") for n in step.group.linears}
            device = next(iter(weights.values())).device
            make = partial(self._made, task, step, readings, {})
            shared = Shared(task.ranks, device, make)
            for name, layer, report in shared.each({n: w.numel() for n, w in weights.items()}):
                result.linears[name], reports[name] = layer, report
        warn_of_hessians(task, reports)
        result.report = BlockReport(linears=reports, fallback=readings.fallback)
        return readings.complete(result)

    def _made(
        self,
        task: BlockTask,
        step: Step,
        readings: Readings,
        factors: dict[Reading, OrderedFactor | str],
        name: str,
    ) -> tuple[UniformLinear, LinearReport]:
        """Quantizes one linear. factors: of the group's Hessian, by how a linear reads its input"""
        linear, reading = task.block.get_submodule(name), readings.linears[name]
        assert isinstance(linear, nn.Linear)
        if reading not in factors:
            factors[reading] = self._factor(step.hessian, reading)
        here = self.at(f"{task.name}.{name}")
        outputs = here._output_factor(task, name)
        return here._linear(name, linear, step, factors[reading], outputs, readings)

    def _steps(self, task: BlockTask, readings: Readings, result: BlockResult) -> Iterator[Step]:
        """Returns the groups of the block, with what quantized linears will see of their inputs."""
        block = readings.rounding_block() if self.match == "self" else task.block
        seen = readings.seen if readings.rounds else None
        return steps(
            task, self.match, "quantized", result.linears, block, readings.attentions, seen
        )

    def _factor(self, hessian: Hessian, reading: Reading) -> OrderedFactor | str:
        """Returns the factored Hessian of the rotated input, or a fallback sentence."""
        if hessian.tokens < self.min_tokens:
            return too_few_tokens(hessian.tokens)
        share = damping_share(self.damping, hessian.tokens, len(hessian.matrix))
        matrix = reading.rotate_hessian(hessian.matrix)
        factor = ordered_factor(matrix, share, self.act_order)
        return NOT_POSITIVE_DEFINITE if factor is None else factor

    def _output_factor(self, task: BlockTask, name: str) -> OrderedFactor | str | None:
        """Returns the factored Hessian of a linear's output, a fallback sentence, or None: off."""
        if not self.output_feedback:
            return None
        hessian = output_hessian(task, name, self.min_tokens)
        if isinstance(hessian, str):
            return hessian
        share = damping_share(self.damping, hessian.tokens, len(hessian.matrix))
        factor = ordered_factor(hessian.matrix, share, self.act_order, TILE)
        return OUTPUT_NOT_POSITIVE_DEFINITE if factor is None else factor

    def _linear(
        self,
        name: str,
        linear: nn.Linear,
        step: Step,
        factor: OrderedFactor | str,
        outputs: OrderedFactor | str | None,
        readings: Readings,
    ) -> tuple[UniformLinear, LinearReport]:
        weight, hessian = linear.weight.detach().float(), step.hessian
        reading = readings.linears[name]
        share = damping_share(self.damping, hessian.tokens, linear.in_features)
        loss = fallback = None
        if isinstance(factor, str):
            fallback, target = factor, Target(weight, None)
            rotated = reading.rotate_weight(weight)
            packed = pack(rotated, linear.bias, minmax_grid(rotated, *self.grid_shape))
        else:
            target = step.target(weight, share)
            rotated = reading.rotate_weight(target.weight)
            grid = self._grid(rotated, reading.rotate_hessian(hessian.matrix))
            fallback, rows = (outputs, None) if isinstance(outputs, str) else (None, outputs)
            packed, loss = pack_with_feedback(rotated, linear.bias, grid, factor, rows)
        packed = readings.read_by(name, packed)
        return packed, LinearReport(
            signal_to_noise_db=signal_to_noise(target.weight, packed),
            proxy_loss=loss,
            output_error=step.output_error(name, weight, packed),
            correction=target.strength,
            tokens=hessian.tokens,
            fallback=fallback,
        )

    def _grid(self, weight: Tensor, hessian: Tensor) -> Grid:
        if not self.clip:
            return minmax_grid(weight, *self.grid_shape)
        return clipped_grid(weight, hessian.diagonal(), self.grid_shape)
