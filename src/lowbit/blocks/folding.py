"""Apply folds: scale and shift channels of a block without changing its output.

These are pure functions over a dictionary of a block's tensors. Training calls them with gradients
(through torch.func.functional_call) and the final result is made without, by the same code.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowbit.blocks import Fold

Tensors = dict[str, Tensor]


def tensors_of(block: nn.Module) -> Tensors:
    """Returns all parameters of a block by name, detached."""
    return {name: parameter.detach() for name, parameter in block.named_parameters()}


def apply_fold(tensors: Tensors, fold: Fold, scale: Tensor, shift: Tensor | None = None) -> Tensors:
    """Returns the tensors with one fold applied, in a new dictionary.

    tensors: the block's tensors by name; they are not changed.
    scale: (fold.size,) float32, never 0.
    shift: (fold.size,) float32, or None for no shift.

    Raises ValueError for a shift if the fold is not shiftable.

    Source: OmniQuant (arXiv 2308.13137), section 3.3, equations 3 to 5:
    Y = ((X - shift) / scale) (scale W) + (B + shift W).
    """
    if shift is not None and not fold.shiftable:
        raise ValueError(
            f"fold {fold.name} cannot absorb a shift: its source or a reader has no bias"
        )
    changed = dict(tensors)
    source_scale = scale if fold.source_channels is None else scale[fold.source_channels]
    _divide_source(changed, fold, source_scale, shift)
    if fold.kind == "rotary":
        _multiply_rows(changed, fold.readers[0], fold.reader_rows, _by_reader_column(scale, fold))
        return changed
    for reader in fold.readers:
        weight = changed[f"{reader}.weight"]
        if shift is not None:
            moved = weight @ _by_reader_column(shift, fold)
            changed[f"{reader}.bias"] = changed[f"{reader}.bias"] + moved
        changed[f"{reader}.weight"] = weight * _by_reader_column(scale, fold)
    return changed


def apply_folds(
    tensors: Tensors,
    folds: Mapping[str, Fold],
    scales: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """Returns the tensors with several folds applied, in a new dictionary.

    Each fold leaves the block's output unchanged, so their order does not matter.

    folds: the folds by name.
    scales: the scale of each fold to apply, by the fold's name.
    shifts: the shifts of some of these folds, by the fold's name.
    """
    tensors = dict(tensors)
    for name, scale in scales.items():
        tensors = apply_fold(tensors, folds[name], scale, (shifts or {}).get(name))
    return tensors


def _by_reader_column(values: Tensor, fold: Fold) -> Tensor:
    """Returns the value of each reader column, from one value per free channel."""
    return values if fold.reader_channels is None else values[fold.reader_channels]


def _divide_source(tensors: Tensors, fold: Fold, scale: Tensor, shift: Tensor | None) -> None:
    bias = f"{fold.source}.bias"
    if shift is not None:
        tensors[bias] = _add_rows(tensors[bias], fold.source_rows, -shift)
    _multiply_rows(tensors, fold.source, fold.source_rows, 1 / scale)
    if fold.offset:  # (w + offset) / scale - offset
        weight = f"{fold.source}.weight"
        tensors[weight] = tensors[weight] + fold.offset / scale - fold.offset


def _multiply_rows(tensors: Tensors, name: str, rows: Tensor | None, factor: Tensor) -> None:
    """Multiplies rows of a matrix, or entries of a norm's weight, and of a bias, in place."""
    for part in ("weight", "bias"):
        tensor = tensors.get(f"{name}.{part}")
        if tensor is None:
            continue
        shaped = factor.view(-1, *[1] * (tensor.dim() - 1))
        if rows is None:
            tensors[f"{name}.{part}"] = tensor * shaped
        else:
            rows = rows.to(tensor.device)
            tensors[f"{name}.{part}"] = tensor.index_copy(0, rows, tensor[rows] * shaped)


def _add_rows(tensor: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    if rows is None:
        return tensor + values
    return tensor.index_add(0, rows.to(tensor.device), values)


def load_changed(block: nn.Module, tensors: Tensors) -> None:
    """Copies tensors into the parameters of the block."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(tensors[name])
