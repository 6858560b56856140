"""MatQuant (Nair et al., ICML 2025, arXiv 2502.06786), for weights alone, based on OmniQuant.

It learns one model of 8-bit codes (the master) whose upper bits are good models too (the slices).
For each width of `widths`, the loss has the squared error of the block's output at that width; the
weighted sum of these errors is minimised (equation 7) over the clipping ranges, and the channel
scales, of one 8-bit grid, by gradient descent straight through rounding and slicing. Other widths
from 2 to 8 can be sliced as well (section 4.2). With `extra_precision` a slice has one more level
(equation 8). With `distill` a width also learns from a higher one (section 4.3).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lowbit.blocks import BlockTask, Stream
from lowbit.blocks.capture import call_block
from lowbit.blocks.folding import Tensors
from lowbit.blocks.parts import sum_of_parts
from lowbit.blocks.statistics import ChannelStatistics, input_statistics, tokens_by_linear
from lowbit.blocks.training import fit, mean_loss
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.nested import NestedLinear, tensor_bytes
from lowbit.kernels.slicing import MASTER_BITS
from lowbit.methods.grid import GroupSize
from lowbit.methods.learned import NEAREST_BETTER, LearningMethod, keep_if_better, packed_block
from lowbit.methods.matquant.packing import pack_nested
from lowbit.methods.matquant.slices import fake_slice, master_codes
from lowbit.methods.packing import as_stored, pack
from lowbit.methods.result import (
    NOT_POSITIVE_DEFINITE,
    BlockResult,
    signal_to_noise,
    trained_report,
    warn_of_hessians,
)
from lowbit.run_report import LinearReport
from lowbit.solvers.block_learner import BlockLearner
from lowbit.solvers.clipping import rounding_error
from lowbit.solvers.gptq import OrderedFactor
from lowbit.solvers.rounding import Grid, GridShape, fake_quantize, grouped

# Share of weights whose code is the additional one of extra_precision, by width; each costs a bit.
# Measured on llama-mini at 2, 3, 4 and 6 bits with benchmarks/matquant.py.
TOP_CODES = {2: 0.32, 3: 0.11, 4: 0.06, 5: 0.04, 6: 0.03, 7: 0.02}
ATTENTION = ("attn", "attention")  # found in transformers' names of attention modules


class MatQuant(LearningMethod):
    """Makes 8-bit codes whose upper 2 to 7 bits are good models too.

    Source: MatQuant (Nair et al., ICML 2025, arXiv 2502.06786). One folder then runs at any width
    from 8 to 2 bits (`lowbit.load(folder, bits=4)`, `set_bits`), or with a width for each layer
    (`mix`), and `slice` writes one width as a folder of its own.
    """

    name: ClassVar[str] = "matquant"
    per_linear: ClassVar[tuple[str, ...]] = ("group_size", "symmetric", "extra_precision")

    widths: list[int] = Field(
        [8, 4, 2],
        min_length=1,
        description="Bits of the slices that are optimised, each from 2 to 8, from high to low; "
        "all other widths can be sliced too.",
    )
    weights: list[float] = Field(
        [12.0, 12.0, 1.0],
        description="Weight of each slice's error in the loss, in the order of widths; each is "
        "above 0; the error of 2 bits is some hundred times that of 4.",
    )
    group_size: GroupSize = Field(
        None,
        ge=1,
        description="Input channels that share a scale and a zero point; None: all of a row do.",
    )
    symmetric: bool = Field(
        False,
        description="Whether all zero points are 128, so that a weight of 0 is 0 in every slice.",
    )
    extra_precision: bool = Field(
        False,
        description="Whether a slice has one level more than its bits allow, at the cost of one "
        "bit for each weight that has its top code.",
    )
    distill: list[str] = Field(
        [],
        description='Slices that also learn from a wider one, as ["8->2"]: the target of the 2-bit '
        "slice is then the mean of the float block's and the 8-bit slice's outputs.",
    )
    distill_alone: bool = Field(
        False,
        description="Whether the wider slice's output is the only target of a slice in distill.",
    )
    scope: Literal["all", "ffn"] = Field(
        "all",
        description='What has slices: "all" linears, or "ffn", those of the feed-forward part, as '
        "in the paper; attention is then rounded to nearest at 8 bits.",
    )
    inputs: Literal["per_bit", "shared_8", "shared_float"] = Field(
        "per_bit",
        description='What a slice learns on: the outputs of blocks at its own width ("per_bit"), '
        'at 8 bits ("shared_8") or in float ("shared_float").',
    )
    rounding: Literal["nearest", "joint"] = Field(
        "joint",
        description='How codes are chosen: "nearest" as published, or "joint", by a Hessian for '
        "all widths together, which favours the widths with the largest weights.",
    )

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        if not all(2 <= width <= MASTER_BITS for width in self.widths):
            raise ValueError(f"widths is {self.widths}: allowed are 2 to {MASTER_BITS}")
        if sorted(set(self.widths), reverse=True) != self.widths:
            raise ValueError(f"widths is {self.widths}: list each width once, from high to low")
        if len(self.weights) != len(self.widths) or not all(w > 0 for w in self.weights):
            raise ValueError(
                f"weights is {self.weights}: give one number above 0 for each of the widths "
                f"{self.widths}, and remove widths that should not count"
            )
        for lesson in self.distill:
            if not re.fullmatch("[2-8]->[2-8]", lesson):
                raise ValueError(f"distill has {lesson!r}: write its entries as '8->2'")
            teacher, student = _lesson(lesson)
            if not {teacher, student} <= set(self.widths) or teacher <= student:
                raise ValueError(
                    f"distill has {lesson!r}: both must be in widths {self.widths}, the higher "
                    "one first"
                )
        return self

    def streams(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("float", *map(self.stream_of, self.widths))))

    def weight_bytes(self, rows: int, columns: int, width: int = MASTER_BITS) -> int:
        """Returns the bytes of a linear on disk, without its bias.

        width: the width of a slice that is stored alone; 8: the master, which has all slices.
        """
        resident = "master" if width == MASTER_BITS else "slice"
        shape, size, symmetric = (rows, columns), self.group_size, self.symmetric
        share = TOP_CODES[width] if self.extra_precision and resident == "slice" else 0.0
        top_codes = round(share * rows * columns)
        return tensor_bytes(shape, width, size, symmetric, resident, top_codes, "float16")

    def stream_of(self, width: int) -> str:
        """Returns the name of the stream on which the slice of a width learns."""
        shared = {"per_bit": str(width), "shared_8": str(MASTER_BITS), "shared_float": "float"}
        return shared[self.inputs]

    def install(self, block: nn.Module, result: BlockResult, stream: str) -> None:
        """Changes the block as in `Method.install`; stream "4" passes through it at 4 bits."""
        if stream == "float":
            return
        linears: dict[str, QuantizedLinear] = {
            name: layer.at(int(stream)) if isinstance(layer, NestedLinear) else layer
            for name, layer in result.linears.items()
        }
        replace(result, linears=linears).install(block)

    def quantize(self, task: BlockTask) -> BlockResult:
        statistics = input_statistics(task.block, task.groups, task.streams["float"])
        fallbacks = self.fallbacks(tokens_by_linear(task.groups, statistics))
        learner = _Learner(self, task, statistics, set(fallbacks))
        loss = _Loss(self, task)
        fitted = fit(
            learner.parameter_groups(),
            lambda index: loss(index, learner.master()),
            loss.batches,
            self.epochs,
            task.log,
            self.weight_decay,
        )
        nearest = learner.nearest()
        loss_nearest = mean_loss(lambda index: loss(index, nearest), loss.batches)
        keep = keep_if_better(learner, task, fitted.after, loss_nearest)
        searched = self.epochs > 0 or self.starts_from() == "awq" or bool(task.start)
        learned = keep and searched and (self.lwc or self.let)
        factors: dict[str, OrderedFactor] = {}
        if self.rounding == "joint":
            factors = self.factors(task, learner, self._shares())
            failed = [n for n in learner.settings if n not in factors and n not in fallbacks]
            fallbacks |= dict.fromkeys(failed, NOT_POSITIVE_DEFINITE)
        result = learner.result(factors, learned, fallbacks)
        warn_of_hessians(task, result.report.linears)
        after = fitted.after if keep else loss_nearest
        if self.rounding == "joint":  # fitted.after is the loss with the nearest codes
            packed = learner.packed(result.linears)
            after = mean_loss(lambda index: loss(index, packed), loss.batches)
        reasons = [] if keep else [NEAREST_BETTER]
        result.report = trained_report(result.report.linears, fitted, loss_nearest, after, reasons)
        return result

    def _shares(self) -> dict[str, float]:
        """Returns the loss weight of each stream: the sum over its widths, normalised to 1."""
        shares: dict[str, float] = {}
        for width, weight in zip(self.widths, self.weights, strict=True):
            stream = self.stream_of(width)
            shares[stream] = shares.get(stream, 0.0) + weight / sum(self.weights)
        return shares


@dataclass(frozen=True)
class _Master:
    """A block with 8-bit codes, from which the block at any width can be computed.

    tensors: the block's float tensors after folding.
    grids: the 8-bit grid of each linear, by name.
    codes: the 8-bit codes of each linear that is sliced, by name; see `master_codes`.
    settings: the settings of the linears that are sliced, by name; the others keep 8 bits.
    """

    tensors: Tensors
    grids: Mapping[str, Grid]
    codes: Mapping[str, Tensor]
    settings: Mapping[str, MatQuant]

    def parts(self) -> Tensors:
        """Returns all tensors that gradients flow through, by name."""
        return self.tensors | {f"{name} scale": grid.scale for name, grid in self.grids.items()}

    def at(self, width: int, parts: Mapping[str, Tensor]) -> Tensors:
        """Returns the tensors of the block at one width.

        parts: what `parts` returned, or a copy of it to differentiate by.
        """
        tensors = {name: parts[name] for name in self.tensors}
        for name, grid in self.grids.items():
            weight, grid = parts[f"{name}.weight"], replace(grid, scale=parts[f"{name} scale"])
            if name in self.settings:
                extra = self.settings[name].extra_precision
                rounded = fake_slice(weight, grid, self.codes[name], width, extra)
            else:
                rounded = fake_quantize(weight, grid)
            tensors[f"{name}.weight"] = rounded
        return tensors


class _Learner(BlockLearner):
    """The learned parameters of one block, and the master that they give."""

    def __init__(
        self,
        method: MatQuant,
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
        outside = set(settings) - set(self.settings)
        super().__init__(task, statistics, unclipped | outside, method.learning(), shapes)

    def squared_error(self, name: str, weight: Tensor, grid: Grid) -> Tensor:
        """Returns the weighted sum of the squared errors of all widths: (out, in)."""
        if name not in self.settings:
            return rounding_error(weight, grid)
        extra, codes = self.settings[name].extra_precision, master_codes(weight, grid)
        total = torch.zeros_like(weight)
        for share, width in zip(self.method.weights, self.method.widths, strict=True):
            total += share * (fake_slice(weight, grid, codes, width, extra) - weight).square()
        return total

    def master(self) -> _Master:
        """Returns the learned master, differentiable in all parameters."""
        return self._master(self.folded(), self.grid)

    def nearest(self) -> _Master:
        """Returns the master of rounding to nearest at 8 bits; its slices are the baseline."""
        return self._master(self.float_tensors, self.whole_grid)

    @torch.no_grad()
    def packed(self, layers: Mapping[str, QuantizedLinear]) -> _Master:
        """Returns the master with the grids and codes of the packed layers."""
        made = self.master()
        grids, codes = dict(made.grids), dict(made.codes)
        for name, layer in layers.items():
            if isinstance(layer, NestedLinear):
                grids[name] = as_stored(grids[name], layer)
                codes[name] = grouped(layer.master, grids[name].group_size).to(torch.int16)
        return replace(made, grids=grids, codes=codes)

    def _master(self, tensors: Tensors, grid: Callable[[str, Tensor], Grid]) -> _Master:
        grids = {name: grid(name, tensors[f"{name}.weight"]) for name in self.linears}
        codes = {
            name: master_codes(tensors[f"{name}.weight"], grids[name]) for name in self.settings
        }
        return _Master(tensors, grids, codes, self.settings)

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
        weights = dict(zip(self.method.widths, self.method.weights, strict=True))

        def packed(
            name: str, weight: Tensor, bias: Tensor | None, _: object
        ) -> tuple[QuantizedLinear, LinearReport]:
            grid = self.grid(name, weight)

            def report(
                layer: QuantizedLinear, slices: Mapping[int, QuantizedLinear]
            ) -> LinearReport:
                return LinearReport(
                    signal_to_noise_db=signal_to_noise(weight, layer),
                    slices_db={width: signal_to_noise(weight, x) for width, x in slices.items()},
                    tokens=self.tokens[name],
                    fallback=fallbacks.get(name),
                )

            if name not in self.settings:
                plain = pack(weight, bias, grid)
                return plain, report(plain, {})
            extra = self.settings[name].extra_precision
            made = learned and self.tokens[name] >= self.method.min_tokens
            nested = pack_nested(weight, bias, grid, factors.get(name), weights, extra, made)
            return nested, report(nested, {width: nested.at(width) for width in weights})

        return packed_block(self, packed)


class _Loss:
    """The loss of a batch: the weighted sum over widths of the squared error of the output."""

    def __init__(self, method: MatQuant, task: BlockTask) -> None:
        self.method = method
        self.block = task.block
        self.streams = task.streams
        self.target = self._float_output("float")
        self.aug_targets: dict[str, Stream] = {}
        if method.aug_loss:
            used = {method.stream_of(width) for width in method.widths}
            self.aug_targets = {n: self._float_output(n) for n in sorted(used - {"float"})}
        self.batches = len(self.target)

    def _float_output(self, stream: str) -> Stream:
        return self.streams[stream].map(lambda batch: call_block(self.block, batch))

    def __call__(self, index: int, master: _Master) -> Tensor:
        return sum_of_parts(master.parts(), lambda parts: self._terms(index, master, parts))

    def _terms(self, index: int, master: _Master, parts: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yields the term of each width, from high to low, so that teachers precede students."""
        outputs: dict[int, Tensor] = {}
        for width, weight in zip(self.method.widths, self.method.weights, strict=True):
            stream = self.method.stream_of(width)
            batch = self.streams[stream][index]
            tensors = master.at(width, parts)
            out = functional_call(self.block, tensors, (batch.hidden,), dict(batch.kwargs))
            out = out[0] if isinstance(out, tuple) else out
            lessons = map(_lesson, self.method.distill)
            targets = [outputs[teacher] for teacher, student in lessons if student == width]
            outputs[width] = out.detach()
            if not targets or not self.method.distill_alone:
                targets.append(self.target[index].hidden)
            error = torch.stack([functional.mse_loss(out, target) for target in targets]).mean()
            if stream in self.aug_targets:
                error = error + functional.mse_loss(out, self.aug_targets[stream][index].hidden)
            yield weight * error


def _lesson(text: str) -> tuple[int, int]:
    """Returns (teacher, student): (8, 2) for "8->2"."""
    teacher, student = text.split("->")
    return int(teacher), int(student)


def _is_ffn(linear: str) -> bool:
    return not any(name in part for part in linear.split(".") for name in ATTENTION)
