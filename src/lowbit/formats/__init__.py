"""The stored formats by name, and a layer from what config.json says about it."""

from collections.abc import Mapping
from typing import Any

from lowbit.config import unknown_name
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
