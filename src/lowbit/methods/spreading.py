"""Prepares a block for linears that rotate their inputs, without changing what it computes.

Scales of channels are balanced where a norm absorbs them (`lowbit.solvers.balance`), so that the
outliers that a norm makes cost nothing. Where linears could absorb scales, between v_proj and
o_proj or up_proj and down_proj, nothing was gained (RTN at W4A4 on tinystories-656k, the mean of
three seeds, 24 windows: KL 0.226 and 0.224, without 0.222). Where attention rounds, the heads of
values are rotated in the weights that make and read them, so that this takes no time when the model
runs.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.blocks import BlockTask, Fold
from lowbit.blocks.folding import Tensors, apply_fold, load_changed, tensors_of
from lowbit.kernels.heads import rotate_heads
from lowbit.solvers.balance import balanced_scale


@dataclass(frozen=True)
class Spread:
    """A block that is ready for rotated inputs.

    task: the task of the method, with the changed block.
    attentions: the attentions whose values are rotated in the weights.
    """

    task: BlockTask
    attentions: frozenset[str] = frozenset()


def spread(
    task: BlockTask,
    rotated: Collection[str],
    attentions: Collection[str],
    squares: Mapping[str, Tensor],
    seed: int,
) -> Spread:
    """Prepares a block.

    rotated: the linears whose inputs are rotated.
    attentions: the attentions whose heads are rotated and rounded.
    squares: the mean square of each input channel, by the name of the linear that reads it; may be
        empty.
    seed: of the signs that heads are rotated with.
    """
    if not rotated:
        return Spread(task)
    tensors = tensors_of(task.block)
    for fold in task.folds:
        if fold.kind == "norm" and not set(rotated).isdisjoint(fold.readers):
            tensors = apply_fold(tensors, fold, balanced_scale(fold, tensors, squares, rotated))
    quantized = {name for group in task.groups for name in group.linears}
    done = set()
    for fold in task.folds:
        ends = {fold.source, *fold.readers}
        inside = {a for a in attentions if all(end.startswith(f"{a}.") for end in ends)}
        if fold.kind == "values" and ends <= quantized and inside and fold.head_width:
            _rotate_values(tensors, fold, seed)
            done |= inside
    block = deepcopy(task.block)
    load_changed(block, tensors)
    return Spread(replace(task, block=block), frozenset(done))


def _rotate_values(tensors: Tensors, fold: Fold, seed: int) -> None:
    """Rotates each head of values, in the rows of the source and the columns of the reader."""
    width = fold.head_width
    for part in ("weight", "bias"):
        tensor = tensors.get(f"{fold.source}.{part}")
        if tensor is None:
            continue
        rows = torch.arange(len(tensor)) if fold.source_rows is None else fold.source_rows
        rows = rows.to(tensor.device)
        columns = tensor[rows].reshape(len(rows), -1).T.unflatten(1, (-1, width))
        turned = rotate_heads(columns, seed).flatten(1).T.reshape(tensor[rows].shape)
        tensors[f"{fold.source}.{part}"] = tensor.index_copy(0, rows, turned)
    for reader in fold.readers:
        heads = tensors[f"{reader}.weight"].unflatten(1, (-1, width))
        tensors[f"{reader}.weight"] = rotate_heads(heads, seed).flatten(1)
