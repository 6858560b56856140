"""The stored formats by name, a layer from its entry in config.json, and how layers multiply."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowbit.config import unknown_name
from lowbit.formats.backend import force
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.binary import BinaryLinear
from lowbit.formats.dense import DenseLinear
from lowbit.formats.lattice import LatticeLinear
from lowbit.formats.nested import NestedLinear
from lowbit.formats.sorted_group import SortedGroupLinear
from lowbit.formats.uniform import UniformLinear

FORMATS: dict[str, type[QuantizedLinear]] = {
    "binary": BinaryLinear,
    "dense": DenseLinear,
    "lattice": LatticeLinear,
    "nested": NestedLinear,
    "sorted_group": SortedGroupLinear,
    "uniform": UniformLinear,
}

MANY_TOKENS = 128  # a prompt, where the backend may be another one than for one token


def build(entry: dict[str, Any]) -> QuantizedLinear:
    """The empty layer that an entry describes. Raises ValueError for an entry that cannot be."""
    if not isinstance(entry, dict):
        raise ValueError(f"entry is {entry!r:.80}: allowed is a dict that names its format")
    name = entry.get("format", "")
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format: {unknown_name(str(name), FORMATS, 'format')}")
    return FORMATS[name].from_entry(entry)


def link(layers: Mapping[str, QuantizedLinear]) -> None:
    """Gives every layer whose entry says "shares" the layer of that name. Call it after building.

    layers: by name, as the entries name them. Raises ValueError, by the name of the layer, for one
    that is not there, that itself shares, or that does not fit.
    """
    for name, layer in layers.items():
        if layer.shares is None:
            continue
        if layer.shares not in layers:
            raise ValueError(f"layer {name}: {layer.shares!r}, which it shares with, is not there")
        try:
            layer.link(layers[layer.shares])
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces all layers to multiply by one backend, as in `with lowbit.backend("reference"):`.

    It holds in this thread until the block is left, and can also decorate a function. Every format
    has a "reference"; `lowbit inspect` shows the others. A layer that was compiled keeps the one
    that it was compiled with.

    name: of the backend. Raises ValueError for a name that no format has. A layer whose format has
    no such backend, or where it does not support the call, raises ValueError when it is run.
    """
    known = {known.name for format_class in FORMATS.values() for known in format_class.backends}
    if name not in known:
        raise ValueError(unknown_name(str(name), known, "backend"))
    with force(name):
        yield


def repack(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Makes ahead of time what the backends of a model's layers derive from their tensors.

    Call it after loading; otherwise the first forward does it.

    model: its layers on the meta device are left alone.
    dtype: of the inputs that will come.
    """
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear) and not any(p.is_meta for p in layer.parameters()):
            for tokens in (1, MANY_TOKENS):
                layer.repack(tokens, dtype)
