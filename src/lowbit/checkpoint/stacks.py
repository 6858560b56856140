"""Arranges float weights as the checkpoint of the source model had them.

Quantized layers are (out, in) and one by one. A float checkpoint may store the weight of GPT-2's
Conv1D as (in, out), and the matrices of all experts of a block in one tensor: see `Stack` in
formats/entry.py.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.formats.entry import Stack

Members = dict[int, dict[str, Tensor]]  # the tensors of a stack, by number of the expert and layer


def stack_of(entry: Mapping[str, Any]) -> Stack | None:
    """Returns where the source stacks the weight of a layer. entry: the layer's, in config.json"""
    return Stack.model_validate(entry["stack"]) if entry.get("stack") else None


def as_in_source(
    tensors: Mapping[str, Tensor], entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Returns the tensors of a shard as the source model had them.

    tensors: by name on disk; of quantized layers `weight`, (out, in), and `bias`.
    entries: the entries of all quantized layers, by name on disk.

    Raises ValueError, with the stack, if some of its experts are missing.
    """
    made: dict[str, Tensor] = {}
    stacks: dict[str, Members] = defaultdict(lambda: defaultdict(dict))
    places: dict[str, dict[str, Stack]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        entry = entries.get(layer, {})
        stack = stack_of(entry)
        if stack is None:
            transposed = entry.get("transposed") and kind == "weight"
            made[name] = tensor.T.contiguous() if transposed else tensor
            continue
        stacked = stack.tensor if kind == "weight" else stack.bias or name
        number, linear = number_of(layer)
        stacks[stacked][number][linear] = tensor
        places[stacked][linear] = stack
    for name, members in stacks.items():
        if name in made:
            raise ValueError(f"{name} is a tensor of its own, but experts would be stacked in it")
        made[name] = _stacked(name, members, places[name])
    return made


def number_of(layer: str) -> tuple[int, str]:
    """Returns the number of the expert that a layer is in, and the layer's name in the expert."""
    path, _, linear = layer.rpartition(".")
    number = path.rpartition(".")[2]
    if not number.isdecimal():
        raise ValueError(f"layer {layer} is in a stack of experts, but its name has no number")
    return int(number), linear


def _stacked(name: str, members: Members, places: Mapping[str, Stack]) -> Tensor:
    """Returns a stack of all experts. places: where each layer of an expert is in it, by name"""
    experts = []
    for number in range(len(members)):
        if members.get(number, {}).keys() != places.keys():
            raise ValueError(f"{name} cannot be written: expert {number} is not whole")
        experts.append(_expert(name, members[number], places))
    return (torch.cat if next(iter(places.values())).flat else torch.stack)(experts)


def _expert(name: str, layers: Mapping[str, Tensor], places: Mapping[str, Stack]) -> Tensor:
    """Returns the part of a stack that belongs to one expert."""
    first = next(iter(layers.values()))
    made = first.new_empty(sum(len(tensor) for tensor in layers.values()), *first.shape[1:])
    free = torch.ones(len(made), dtype=torch.bool)
    for linear, tensor in layers.items():
        rows = torch.arange(len(tensor)) * places[linear].step + places[linear].start
        if not len(rows) or rows[-1] >= len(made) or not free[rows].all():
            raise ValueError(f"{name} cannot be written: {linear} has rows that are not its own")
        made[rows], free[rows] = tensor, False
    transposed = next(iter(places.values())).transposed
    return made.T if transposed and made.dim() == 2 else made
