"""Layers are built from entries and tensors, without a model."""

from typing import Any

import pytest
import quantized
import torch
from torch import Tensor

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.layers import layers_from

Q, K = (f"model.layers.0.self_attn.{part}_proj" for part in "qk")


def stored(*names: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = QuantizedFolder(quantized.folder(method="quip"))
    tensors = [tensor for name in names for tensor in folder.tensors_of(name)]
    return {name: folder.entries[name] for name in names}, folder.reader.read(tensors)


def test_layers_hold_their_tensors_and_are_linked() -> None:
    entries, tensors = stored(Q, K)
    layers = layers_from(entries, tensors)
    assert layers[K].owner is layers[Q] and layers[Q].owner is layers[Q]
    for name, layer in layers.items():
        assert layer.entry() == entries[name]
        assert all(torch.equal(t, tensors[f"{name}.{k}"]) for k, t in layer.state_dict().items())
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert layer.dequantize().isfinite().all()


def test_what_does_not_fit_is_named() -> None:
    entries, tensors = stored(Q, K)
    with pytest.raises(ValueError, match=f"layer {K}: it shares with '{Q}', which does not exist"):
        layers_from({K: entries[K]}, tensors)
    packed = f"{Q}.packed"
    for damaged, message in (
        ({}, "is missing"),
        ({packed: tensors[packed][:-1]}, r"is torch.uint8 \[47, .*asks for torch.uint8 \[48, "),
        ({packed: tensors[packed].char()}, "is torch.int8 .*asks for torch.uint8"),
    ):
        rest = {name: tensor for name, tensor in tensors.items() if name != packed}
        with pytest.raises(ValueError, match=f"tensor {packed} {message}"):
            layers_from(entries, rest | damaged)
