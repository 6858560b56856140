"""MixedQuant: few bits for weights and inputs, salient channels in float, all others sorted.

After the project adithyab100/smoothquant-mixedprecision (2024; there is no paper), with one order
for inputs and weights, found once on calibration text: so that an integer product can be had, that
a token's result depends on that token alone, and that salient columns widen no group's scale.
SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4) may go before, GPTQ may round the weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lowbit.blocks import BlockResult, BlockTask, Fold, LinearGroup
from lowbit.blocks.folding import Tensors, apply_folds, tensors_of
from lowbit.blocks.hessian import Hessians, input_hessians
from lowbit.blocks.statistics import ChannelStatistics, input_statistics
from lowbit.formats import link
from lowbit.formats.sorted_group import InputOrder, SortedGroupLayout, SortedGroupLinear
from lowbit.formats.uniform.reference import group_count
from lowbit.methods.method import Method, signal_to_noise, tell_without_feedback
from lowbit.methods.mixedquant.absorbing import SplitHessian, split_hessian
from lowbit.methods.mixedquant.ordering import (
    Salience,
    Sort,
    channel_order,
    column_max,
    column_norm,
    importance,
    is_identity,
    salient_count,
    sort_key,
)
from lowbit.solvers.clipping import clipped_grid
from lowbit.solvers.equivalence import smooth_scale
from lowbit.solvers.feedback import proxy_loss
from lowbit.solvers.gptq import gptq_codes
from lowbit.solvers.rounding import Grid, GridShape, minmax_grid

# What linears that read the same input have in common.
OF_THE_INPUT = ("activation_bits", "group_size", "salient_ratio", "alignment", "salience", "sort")
UNROUNDED = 16  # activation_bits that leave inputs as they are


class MixedQuant(Method):
    """bits: of weights. activation_bits: of inputs, rounded when the model runs; 16: left alone.

    group_size: inputs per scale, of weights and of inputs; None: all. salient_ratio: share of the
    inputs that stays float, as the nearest multiple of `alignment`, chosen by `salience`.
    salient_bits: of their weights; 8: integers with a scale per row. sort: by which key the others
    are ordered before they are cut into groups; see `solvers/ordering.py`. smooth: SmoothQuant's
    alpha; None: no smoothing. clip: search the range of each group that loses least, instead of
    taking the whole. rounding: of weights; damping: of GPTQ's Hessian. min_tokens: an expert that
    saw fewer calibration tokens is ordered by its weights and rounded to nearest, and named in the
    report.
    """

    name: ClassVar[str] = "mixedquant"
    per_linear: ClassVar[tuple[str, ...]] = (
        *("bits", "salient_bits", "clip", "rounding"),
        *OF_THE_INPUT,
    )

    bits: int = Field(4, ge=2, le=8)
    activation_bits: int = Field(4, ge=2, le=UNROUNDED)
    group_size: int | None = Field(128, ge=4, le=1024)
    salient_ratio: float = Field(0.05, ge=0, le=0.1)
    alignment: int = Field(32, ge=1)
    salience: Salience = "absmean"
    salient_bits: Literal[8, 16] = 16
    sort: Sort = "mean3std"
    smooth: float | None = Field(None, ge=0, le=1)
    clip: bool = True
    rounding: Literal["nearest", "gptq"] = "nearest"
    damping: float = Field(0.01, gt=0)
    min_tokens: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if 8 < self.activation_bits < UNROUNDED:
            raise ValueError(
                f"activation_bits is {self.activation_bits}: allowed are 2 to 8, and {UNROUNDED} "
                "for inputs that are not rounded"
            )
        if self.group_size is None and self.sort != "none":
            raise ValueError(
                f"sort is {self.sort}: with group_size null there are no groups to sort inputs "
                "into; set sort to none"
            )
        return self

    def streams(self) -> tuple[str, ...]:
        return ("quantized",)

    def quantize(self, task: BlockTask) -> BlockResult:
        statistics = input_statistics(task.block, task.groups, task.streams["quantized"])
        smoothing = self._smoothing(task, statistics)
        tensors = apply_folds(tensors_of(task.block), *smoothing)
        groups: list[_Group] = []
        for group in task.groups:
            scale = _of_columns(group, *smoothing)
            groups.append(self._ordered(task, group, tensors, statistics[group.name], scale))
        _permute_producers(task, groups, tensors)
        hessians = self._hessians(task)
        result = BlockResult({}, report={"linears": {}, "groups": {}})
        for ordered in groups:
            split = None
            if hessians is not None and not ordered.starved:
                split = self._split(task, ordered, hessians, result)
            self._quantize_group(task, ordered, tensors, split, result)
        _keep_changed(task, tensors, result)
        return result

    def _common(self, task: BlockTask, group: LinearGroup) -> Self:
        """The settings for an input. Raises ValueError where overrides part those who read it."""
        each = [self.at(f"{task.name}.{name}") for name in group.linears]
        for field in OF_THE_INPUT:
            values = [getattr(settings, field) for settings in each]
            if len(set(values)) > 1:
                found = ", ".join(map(str, values))
                raise ValueError(
                    f"overrides give {field} as {found} for {', '.join(group.linears)} of "
                    f"{task.name}: they read the same input, so they need the same"
                )
        return each[0]

    def _smoothing(
        self, task: BlockTask, statistics: Mapping[str, ChannelStatistics]
    ) -> tuple[dict[str, Fold], dict[str, Tensor]]:
        """The folds that are smoothed, and by what."""
        if self.smooth is None:
            return {}, {}
        seen = {
            name: statistics[group.name]
            for group in task.groups
            for name in group.linears
            if statistics[group.name].tokens >= self.min_tokens
        }
        # Not "rotary": queries and keys are no linear's input.
        folds = {f.name: f for f in task.folds if f.kind != "rotary" and seen.keys() & f.readers}
        tensors = tensors_of(task.block)
        return folds, {n: smooth_scale(f, tensors, seen, self.smooth) for n, f in folds.items()}

    def _ordered(
        self,
        task: BlockTask,
        group: LinearGroup,
        tensors: Tensors,
        seen: ChannelStatistics,
        scale: Tensor | None = None,
    ) -> "_Group":
        """Which inputs stay float, and the order of the others. scale: by which x was divided."""
        here = self._common(task, group)
        weights = [tensors[f"{name}.weight"] for name in group.linears]
        starved = seen.tokens < here.min_tokens
        seen = seen if scale is None else seen.divided(scale)
        if starved:
            matters, key = column_norm(weights), column_max(weights)
        else:
            matters, key = (
                importance(here.salience, seen, weights),
                sort_key(here.sort, seen, weights),
            )
        salient = salient_count(here.salient_ratio, here.alignment, len(key))
        if here.sort == "none" or group_count(len(key) - salient, here.group_size) == 1:
            key = torch.zeros_like(matters)
        columns = channel_order(key, matters, salient)
        order = InputOrder(
            None if is_identity(columns) else columns,
            salient,
            here.group_size,
            None if here.activation_bits == UNROUNDED else here.activation_bits,
        )
        return _Group(group, columns, order, seen, starved, scale)

    def _hessians(self, task: BlockTask) -> Hessians | None:
        names = [name for group in task.groups for name in group.linears]
        if all(self.at(f"{task.name}.{name}").rounding == "nearest" for name in names):
            return None
        return input_hessians(task.block, task.groups, task.streams["quantized"])

    def _split(
        self, task: BlockTask, ordered: "_Group", hessians: Hessians, result: BlockResult
    ) -> SplitHessian | None:
        """In the order of the inputs. None, and said so: it would not factor."""
        matrix = hessians[ordered.group.name].matrix
        if ordered.scale is not None:
            matrix = matrix / ordered.scale / ordered.scale.unsqueeze(1)
        matrix = matrix[ordered.columns][:, ordered.columns]
        split = split_hessian(matrix, ordered.kept, self.damping)
        if split is None:
            tell_without_feedback(task, result, ordered.group.linears)
        return split

    def _quantize_group(
        self,
        task: BlockTask,
        ordered: "_Group",
        tensors: Tensors,
        split: SplitHessian | None,
        result: BlockResult,
    ) -> None:
        made: dict[str, SortedGroupLinear] = {}
        first = ordered.group.linears[0]
        for name in ordered.group.linears:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            here = self.at(f"{task.name}.{name}")
            shares = None if name == first else first
            made[name], facts = here._linear(weight, bias, ordered, split, shares)
            link(made)
            wanted = weight if ordered.order.permutation is not None else ordered.of(weight)
            noise = round(signal_to_noise(wanted, made[name]), 2)
            result.report["linears"][name] = {"signal_to_noise_db": noise} | facts
        result.linears |= made
        result.report["groups"][ordered.group.name] = ordered.report()
        if ordered.starved:
            tokens = dict.fromkeys(ordered.group.linears, ordered.seen.tokens)
            result.report.setdefault("rounded_to_nearest", {}).update(tokens)

    def _linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        ordered: "_Group",
        split: SplitHessian | None,
        shares: str | None,
    ) -> tuple[SortedGroupLinear, dict[str, Any]]:
        weight = ordered.of(weight.float())
        ordinary, salient = weight.tensor_split([ordered.kept], 1)
        layout = SortedGroupLayout(ordered.order, self.bits, self.salient_bits, shares)
        grid = self._grid(ordinary, ordered)
        layer = SortedGroupLinear.from_grid(weight, grid.scale, layout, bias=bias)
        if split is None or self.rounding == "nearest":
            return layer, {}
        stored = replace(grid, scale=layer.scale.float())
        codes, _ = gptq_codes(ordinary, stored, split.factor)
        rounded = SortedGroupLinear.from_codes(codes, layer.scale, salient, layout, bias=bias)
        error = ordinary - rounded.ordered()[:, : ordered.kept]
        salient = split.absorbed(salient, error)
        made = SortedGroupLinear.from_codes(codes, layer.scale, salient, layout, bias=bias)
        return made, {"proxy_loss": proxy_loss(weight, made.ordered(), split.hessian)}

    def _grid(self, weight: Tensor, ordered: "_Group") -> Grid:
        shape = GridShape(self.bits, self.group_size, symmetric=True)
        if not self.clip or ordered.starved:
            return minmax_grid(weight, *shape)
        square = ordered.seen.square[ordered.columns[: ordered.kept]]
        return clipped_grid(weight, square, shape)


@dataclass
class _Group:
    """A group with the order of its inputs.

    columns: (in,) int64, the input at each place, whether it is stored or folded into what makes
    the input. seen: after smoothing, in the input's own order. scale: (in,) of the smoothing.
    """

    group: LinearGroup
    columns: Tensor
    order: InputOrder
    seen: ChannelStatistics
    starved: bool
    scale: Tensor | None

    @property
    def kept(self) -> int:
        return len(self.columns) - self.order.salient

    def of(self, weight: Tensor) -> Tensor:
        """weight (out, in) with its columns in the order"""
        return weight[:, self.columns]

    def report(self) -> dict[str, Any]:
        folded = self.order.permutation is None and not is_identity(self.columns)
        stored = "none" if self.order.permutation is None else "stored"
        return {
            "salient": self.order.salient,
            "salient_ratio": round(self.order.salient / len(self.columns), 4),
            "permutation": "folded" if folded else stored,
        }


def _of_columns(
    group: LinearGroup, folds: Mapping[str, Fold], scales: Mapping[str, Tensor]
) -> Tensor | None:
    """By what the input of a group was divided: (in,); None: by nothing."""
    found = None
    for name, fold in folds.items():
        if group.linears[0] in fold.readers:
            channels = fold.reader_channels
            scale = scales[name] if channels is None else scales[name][channels]
            found = scale if found is None else found * scale
    return found


def _permute_producers(task: BlockTask, groups: list[_Group], tensors: Tensors) -> None:
    """Folds orders into what makes an input, where that is exact: no permutation is then stored."""
    by_reader = {ordered.group.linears: ordered for ordered in groups}
    for readers, producers in _gated(task):
        ordered = by_reader[readers]
        if ordered.order.permutation is None:
            continue
        for name in producers:
            for part in ("weight", "bias"):
                if f"{name}.{part}" in tensors:
                    tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][ordered.columns]
        ordered.order = replace(ordered.order, permutation=None)


def _gated(task: BlockTask) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(all readers of an input, up and gate), whose rows, permuted alike, permute the input alone.

    A fold of kind "gated" names up; the gate is the one other linear that reads what up reads.
    Values (v_proj) are no such case: their heads tie them to queries and keys.
    """
    by_linear = {name: group.linears for group in task.groups for name in group.linears}
    for fold in task.folds:
        plain = fold.source_rows is None and fold.source_channels is None
        if fold.kind != "gated" or not plain or fold.reader_channels is not None:
            continue
        producers = by_linear.get(fold.source, ())
        rows = {len(task.block.get_parameter(f"{name}.weight")) for name in producers}
        if len(producers) == 2 and rows == {fold.size} and fold.readers in by_linear.values():
            yield fold.readers, producers


def _keep_changed(task: BlockTask, tensors: Tensors, result: BlockResult) -> None:
    """What smoothing has changed beside the quantized linears."""
    for name, before in tensors_of(task.block).items():
        if name.rpartition(".")[0] not in result.linears and not torch.equal(tensors[name], before):
            result.tensors[name] = tensors[name]
