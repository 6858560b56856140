"""Groups of linears with the order of their input, and folding that order into other linears."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowbit.blocks import BlockTask, Fold, LinearGroup
from lowbit.blocks.folding import Tensors, tensors_of
from lowbit.blocks.statistics import ChannelStatistics
from lowbit.formats.sorted_group import InputOrder
from lowbit.formats.sorted_group.reference import quantize_input, scaled
from lowbit.methods.mixedquant.ordering import is_identity
from lowbit.methods.result import BlockResult
from lowbit.solvers.equivalence import smooth_scale


@dataclass(kw_only=True)
class OrderedGroup:
    """A `LinearGroup` with the order of its input channels.

    group: the linears.
    columns: (in,) int64, the input channel at each position of the order.
    order: the order as the layers store it; without a permutation if the order was folded into the
        linears that produce the input.
    statistics: the statistics of the input after smoothing, in its original order.
    scale: (in,), the scale by which smoothing divides the input; None: no smoothing.
    fallback: the fallback sentence of its linears, if there is one.
    """

    group: LinearGroup
    columns: Tensor
    order: InputOrder
    statistics: ChannelStatistics
    scale: Tensor | None
    fallback: str | None

    @property
    def kept(self) -> int:
        """The number of inputs that are not salient."""
        return len(self.columns) - self.order.salient

    def for_input(self, weight: Tensor) -> Tensor:
        """Returns a weight (out, in) with its columns in the order in which the input arrives.

        It arrives in this order if the order was folded into the linears that produce it.
        """
        return weight[:, self.columns] if self.permutation == "folded" else weight

    def of_input(self, x: Tensor) -> Tensor:
        """Returns x (..., in), whose columns are those of the input as it arrives, in this order"""
        return x if self.order.permutation is None else x[..., self.order.permutation]

    def rounded(self, x: Tensor) -> Tensor:
        """Returns the input as the layers round it, in the order in which it arrives.

        x: (tokens, in).
        """
        order = self.order
        if order.activation_bits is None:
            return x
        kept, salient = self.of_input(x).tensor_split([self.kept], 1)
        codes, scale = quantize_input(kept, order.activation_bits, order.group_size)
        values = torch.cat([scaled(codes, scale, order.group_size), salient], 1)
        if order.permutation is None:
            return values
        return torch.empty_like(values).index_copy_(1, order.permutation, values)

    @property
    def permutation(self) -> Literal["none", "stored", "folded"]:
        """How the order is stored; see `LinearReport`."""
        if self.order.permutation is not None:
            return "stored"
        return "none" if is_identity(self.columns) else "folded"


def input_scale(
    group: LinearGroup, folds: Mapping[str, Fold], scales: Mapping[str, Tensor]
) -> Tensor | None:
    """Returns the scale by which smoothing divides the input of a `LinearGroup`: (in,), or None."""
    product = None
    for name, fold in folds.items():
        if group.linears[0] in fold.readers:
            channels = fold.reader_channels
            scale = scales[name] if channels is None else scales[name][channels]
            product = scale if product is None else product * scale
    return product


def smoothed(
    task: BlockTask,
    statistics: Mapping[str, ChannelStatistics],
    alpha: float | None,
    min_tokens: int,
) -> tuple[dict[str, Fold], dict[str, Tensor]]:
    """Returns the folds that are smoothed, and the scale of each, both by the fold's name.

    statistics: of the input of each `LinearGroup`, by the group's name.
    alpha: the exponent of activations in the scales; None: no smoothing.
    min_tokens: the tokens that the linears of a fold must have seen.
    """
    if alpha is None:
        return {}, {}
    inputs = {
        name: statistics[group.name]
        for group in task.groups
        for name in group.linears
        if statistics[group.name].tokens >= min_tokens
    }
    # Rotary folds scale queries and keys, which are not inputs of linears.
    folds = {f.name: f for f in task.folds if f.kind != "rotary" and inputs.keys() & f.readers}
    tensors = tensors_of(task.block)
    return folds, {n: smooth_scale(f, tensors, inputs, alpha) for n, f in folds.items()}


def permute_producers(task: BlockTask, groups: list[OrderedGroup], tensors: Tensors) -> None:
    """Folds the orders of inputs into the linears that produce them, where that is exact.

    These layers then store no permutation.

    groups: their orders are replaced.
    tensors: the block's tensors by name; rows of the producing linears are permuted.
    """
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


def in_input_order(groups: list[OrderedGroup], tensors: Tensors) -> Tensors:
    """Returns the weights whose columns follow an order that was folded into producers."""
    names = [(ordered, f"{name}.weight") for ordered in groups for name in ordered.group.linears]
    return {name: ordered.for_input(tensors[name]) for ordered, name in names}


def keep_changed(task: BlockTask, tensors: Tensors, result: BlockResult) -> None:
    """Adds the tensors that smoothing changed outside the quantized linears to the result."""
    for name, before in tensors_of(task.block).items():
        if name.rpartition(".")[0] not in result.linears and not torch.equal(tensors[name], before):
            result.tensors[name] = tensors[name]


def _gated(task: BlockTask) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yields (readers, producers) of each input that is the product of an up and a gate projection.

    Permuting the rows of both producers permutes the input and changes nothing else. A fold of kind
    "gated" names the up projection; the gate is the only other linear that reads the same input.
    Values (v_proj) cannot be permuted like this, since each of their heads
    belongs to heads of the queries.
    """
    by_linear = {name: group.linears for group in task.groups for name in group.linears}
    for fold in task.folds:
        plain = fold.source_rows is None and fold.source_channels is None
        if fold.kind != "gated" or not plain or fold.reader_channels is not None:
            continue
        if not fold.permutable:
            continue
        producers = by_linear.get(fold.source, ())
        rows = {len(task.block.get_parameter(f"{name}.weight")) for name in producers}
        if len(producers) == 2 and rows == {fold.size} and fold.readers in by_linear.values():
            yield fold.readers, producers
