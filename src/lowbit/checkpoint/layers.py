"""Quantized layers from their entries and their tensors, without a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import build, link
from lowbit.formats.base import QuantizedLinear


def layers_from(
    entries: Mapping[str, dict[str, Any]], tensors: Mapping[str, Tensor]
) -> dict[str, QuantizedLinear]:
    """Layers on the CPU, with their tensors, each linked to the one that it shares with.

    entries: what config.json says of each layer, by its name on disk; a layer that another one
        shares with must be among them.
    tensors: by name on disk, those of these layers at least.

    Raises ValueError, by the name of the layer, for one whose tensors do not fit its entry.
    """
    layers: dict[str, QuantizedLinear] = {}
    for name, entry in entries.items():
        with torch.device("meta"):
            layers[name] = build(entry)
        expected = layers[name].state_dict()
        found = {key: tensors[f"{name}.{key}"] for key in expected if f"{name}.{key}" in tensors}
        for key, place in expected.items():
            if key not in found:
                raise ValueError(f"tensor {name}.{key} is missing")
            check_tensor(f"{name}.{key}", tuple(found[key].shape), found[key].dtype, place)
        layers[name].load_state_dict(found, assign=True)
    link(layers)
    return layers


def check_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, place: Tensor) -> None:
    """Raises ValueError where a stored tensor has not the shape and dtype of its place."""
    if shape != tuple(place.shape) or dtype != place.dtype:
        raise ValueError(
            f"tensor {name} is {dtype} {list(shape)}, "
            f"but config.json asks for {place.dtype} {list(place.shape)}"
        )
