"""Quantizes the output layer on request: round to nearest, one scale per row, no calibration."""

from typing import Any

import torch
from torch import Tensor

from lowbit.methods.packing import pack
from lowbit.models.source import SourceModel
from lowbit.solvers.rounding import minmax_grid


def outside_blocks(
    source: SourceModel, head_bits: int | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns all tensors outside the blocks, by name on disk, and the record of their shard.

    head_bits: bits of the output layer; None: it stays in float. An output layer that is tied to
        the embedding is untied: the embedding stays in float.

    Raises ValueError for a model whose output layer is not an nn.Linear.
    """
    tensors = source.reader.read(source.outside_tensors())
    if head_bits is None:
        return tensors, {}
    name = _head_of(source)
    tied = source.skeleton.all_tied_weights_keys.get(f"{name}.weight")
    stored = source.disk_names.get(f"{name}.weight")
    if stored is not None:
        disk, weight = stored.removesuffix(".weight"), tensors.pop(stored)
        if tied is not None:
            tensors.setdefault(source.disk_names.get(tied, tied), weight)
    else:
        assert tied is not None  # SourceModel has checked that no tensor is missing
        disk, weight = name, tensors[source.disk_names[tied]]
    bias = tensors.pop(f"{disk}.bias", None)
    floats = weight.float()
    packed = pack(floats, bias, minmax_grid(floats, head_bits, None, False))
    packed = packed.with_dtypes(weight.dtype, None if bias is None else bias.dtype)
    tensors |= {f"{disk}.{key}": tensor for key, tensor in packed.state_dict().items()}
    placeholder = f"{disk}.weight"
    tensors[placeholder] = torch.empty(0, dtype=weight.dtype)
    record = {"modules": {disk: packed.entry()}, "marker": placeholder}
    return tensors, record | {"config": {"tie_word_embeddings": False}}


def _head_of(source: SourceModel) -> str:
    head = source.skeleton.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(
            f"{type(source.skeleton).__name__} has no linear output layer: leave lm_head_bits out"
        )
    return next(name for name, module in source.skeleton.named_modules() if module is head)
