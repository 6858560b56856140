"""Builds quantized layers from their entries in config.json and their tensors, without a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import build, link
from lowbit.formats.base import QuantizedLinear


def layers_from(
    entries: Mapping[str, dict[str, Any]], tensors: Mapping[str, Tensor]
) -> dict[str, QuantizedLinear]:
    """Returns layers on the CPU by name on disk, filled and linked.

    A layer that shares tensors of another one (`shares` in its entry) is linked to that layer.

    entries: the entries of these layers by name on disk, as in config.json; the layer whose tensors
        another one shares must be among them.
    tensors: tensors by name on disk; tensors of other layers are allowed too.

    Raises ValueError, with the name of the tensor, if tensors do not fit the entries.
    """
    layers: dict[str, QuantizedLinear] = {}
    for name, entry in entries.items():
        with torch.device("meta"):
            layers[name] = build(entry)
        expected = layers[name].state_dict()
        stored = {key: tensors[f"{name}.{key}"] for key in expected if f"{name}.{key}" in tensors}
        for key, tensor in expected.items():
            if key not in stored:
                raise ValueError(
                    f"tensor {name}.{key} is missing: layer {name} needs it. Copy the folder from "
                    "its source again, or, in an unfinished run, start over with --restart"
                )
            check_tensor(f"{name}.{key}", tuple(stored[key].shape), stored[key].dtype, tensor)
        layers[name].load_state_dict(stored, assign=True)
    link(layers)
    return layers


def check_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, expected: Tensor) -> None:
    """Raises ValueError if a stored tensor has another shape or dtype than the expected tensor."""
    if shape != tuple(expected.shape) or dtype != expected.dtype:
        raise ValueError(
            f"tensor {name} is {dtype} {list(shape)}, "
            f"but config.json asks for {expected.dtype} {list(expected.shape)}"
        )
