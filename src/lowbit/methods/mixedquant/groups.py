"""Linears that read one input, with the order of that input, and where the order can be folded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from lowbit.blocks import BlockTask, Fold, LinearGroup
from lowbit.blocks.folding import Tensors
from lowbit.blocks.statistics import ChannelStatistics
from lowbit.formats.sorted_group import InputOrder
from lowbit.methods.mixedquant.ordering import is_identity


@dataclass(kw_only=True)
class OrderedGroup:
    """A group with the order of its inputs.

    columns: (in,) int64, the input at each place, whether it is stored or folded into what makes
        the input.
    seen: after smoothing, in the input's own order.
    scale: (in,) of the smoothing.
    fallback: the sentence for its linears, if they are quantized in a simpler way than asked for.
    """

    group: LinearGroup
    columns: Tensor
    order: InputOrder
    seen: ChannelStatistics
    scale: Tensor | None
    fallback: str | None

    @property
    def kept(self) -> int:
        return len(self.columns) - self.order.salient

    def of(self, weight: Tensor) -> Tensor:
        """weight (out, in) with its columns in the order"""
        return weight[:, self.columns]

    @property
    def permutation(self) -> Literal["none", "stored", "folded"]:
        """How the order is kept; see `LinearReport`."""
        if self.order.permutation is not None:
            return "stored"
        return "none" if is_identity(self.columns) else "folded"


def input_scale(
    group: LinearGroup, folds: Mapping[str, Fold], scales: Mapping[str, Tensor]
) -> Tensor | None:
    """The scale by which smoothing has divided the input of a group: (in,); None: there is none."""
    found = None
    for name, fold in folds.items():
        if group.linears[0] in fold.readers:
            channels = fold.reader_channels
            scale = scales[name] if channels is None else scales[name][channels]
            found = scale if found is None else found * scale
    return found


def permute_producers(task: BlockTask, groups: list[OrderedGroup], tensors: Tensors) -> None:
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
