"""The stored formats by name; building, linking and repacking layers; forcing a backend."""

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
from lowbit.formats.embedding import QuantizedEmbedding
from lowbit.formats.lattice import LatticeLinear
from lowbit.formats.native import NativeBackend
from lowbit.formats.nested import NestedLinear
from lowbit.formats.sorted_group import SortedGroupLinear
from lowbit.formats.trellis import TrellisLinear
from lowbit.formats.uniform import UniformLinear

FORMATS: dict[str, type[QuantizedLinear]] = {
    "binary": BinaryLinear,
    "dense": DenseLinear,
    "embedding": QuantizedEmbedding,
    "lattice": LatticeLinear,
    "nested": NestedLinear,
    "sorted_group": SortedGroupLinear,
    "trellis": TrellisLinear,
    "uniform": UniformLinear,
}

MANY_TOKENS = 128  # a prompt; its backend may differ from that of one token


def build(entry: dict[str, Any]) -> QuantizedLinear:
    """Builds the empty layer that an entry of config.json describes.

    Raises ValueError for an invalid entry.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"entry is {entry!r:.80}: allowed is a dict that names its format")
    name = entry.get("format", "")
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format: {unknown_name(str(name), FORMATS, 'format')}")
    return FORMATS[name].from_entry(entry)


def link(layers: Mapping[str, QuantizedLinear]) -> None:
    """Links every layer whose entry has "shares" to the layer of that name. Call it after building.

    layers: by name, as the entries name them.

    Raises ValueError that names the layer, if the layer that it shares with does not exist, itself
    shares with another one, or does not fit.
    """
    for name, layer in layers.items():
        if layer.shares is None:
            continue
        if layer.shares not in layers:
            raise ValueError(f"layer {name}: it shares with {layer.shares!r}, which does not exist")
        try:
            layer.link(layers[layer.shares])
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces all layers to use one backend, as in `with lowbit.backend("reference"):`.

    It applies to this thread until the end of the `with` block. It can also decorate a function. A
    compiled layer keeps the backend with which it was compiled.

    name: name of the backend. Every format has "reference"; `lowbit inspect` shows the others.

    Raises ValueError for a backend that no format has. The forward of a layer raises ValueError if
    its format does not have this backend or the backend does not support the call.
    """
    names = {backend.name for format_class in FORMATS.values() for backend in format_class.backends}
    if name not in names:
        raise ValueError(unknown_name(str(name), names, "backend"))
    with force(name):
        yield


def set_input_bits(model: nn.Module, bits: int) -> None:
    """Sets to how many bits kernels round the inputs of a model's layers, 16 or 8.

    Layers that round their inputs themselves are not changed by it, and neither is what torch
    computes. Raises ValueError for another number of bits.
    """
    if bits not in (8, 16):
        raise ValueError(f"inputs is {bits}: allowed are 8 and 16")
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.set_input_bits(bits)


def keep_packed_only(model: nn.Module) -> list[str]:
    """Frees the stored codes of all layers that the compiled kernels have packed.

    Layers on other devices and without kernels, lattice, trellis and dense layers, and masters of
    nested layers, which other widths are cut from, stay as they are. A freed tensor is made again
    where code asks for it, with the same bytes.

    Returns the names of the layers whose codes were freed.
    """
    freed = []
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear) or any(p.is_meta for p in layer.parameters()):
            continue
        backend = layer.backend_for(1)
        if isinstance(backend, NativeBackend) and backend.free(layer):
            freed.append(name)
    return freed


def repack(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Repacks the tensors of a model's layers for their backends, which the first forward would do.

    Call it after loading, and before torch.compile.

    model: a model with quantized layers; those on the meta device are skipped.
    dtype: dtype of the inputs of later forwards.
    """
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear) and not any(p.is_meta for p in layer.parameters()):
            for tokens in (1, MANY_TOKENS):
                layer.repack(tokens, dtype)
