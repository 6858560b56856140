"""Tensors that backends derive from a layer's own, kept as long as these stay what they were."""

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.formats.backend import Backend

if TYPE_CHECKING:
    from lowbit.formats.base import QuantizedLinear
    from lowbit.formats.entry import LayerEntry

Sources = tuple[tuple[Any, ...], ...]


@dataclass
class _Kept:
    """made: in a list that is empty once one of the layer's tensors has gone."""

    entry: "LayerEntry"
    sources: Sources
    made: list[dict[str, Tensor]]
    watched: list[weakref.ref[Tensor]]


class Repacked:
    """What the backends of one layer made in `Backend.repack`, by the backend's name.

    It is made anew when a tensor of the layer is replaced, written to or moved, or the layer's
    entry changes, and let go when one of the tensors goes. Nothing is kept of tensors that need a
    gradient or were made in inference mode (they have no version that would tell of a change), nor
    while a CUDA graph is recorded. A compiled layer uses what was kept when it was compiled and
    checks the entry alone: call `lowbit.formats.repack` before compiling.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def of(self, layer: "QuantizedLinear", backend: Backend[Any]) -> dict[str, Tensor]:
        """backend.repack(layer), or what it gave before."""
        if type(backend).repack is Backend.repack:
            return {}
        kept = self._kept.get(backend.name)
        if kept is not None and not (kept.made and kept.entry is layer.spec):
            kept = None
        if torch.compiler.is_compiling():
            return backend.repack(layer) if kept is None else kept.made[0]
        sources = _sources(layer)
        if kept is not None and kept.sources == sources:
            return kept.made[0]
        if sources is None:
            return backend.repack(layer)
        with torch.inference_mode(False), torch.no_grad():
            made = backend.repack(layer)
        self._kept[backend.name] = _keep(layer, sources, made)
        return made


def _keep(layer: "QuantizedLinear", sources: Sources, made: dict[str, Tensor]) -> _Kept:
    for device in {tensor.device for tensor in made.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()  # any stream may use them from now on
    held = [made]
    watched = [weakref.ref(tensor, lambda _: held.clear()) for tensor in layer.own_tensors()]
    return _Kept(layer.spec, sources, held, watched)


def _sources(layer: "QuantizedLinear") -> Sources | None:
    """What tells that the layer's tensors are still the same; None where that cannot be told."""
    tensors = layer.own_tensors()
    if any(tensor.is_inference() or tensor.requires_grad for tensor in tensors):
        return None
    if any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing():
        return None
    return tuple((id(t), t._version, t.device, t.data_ptr()) for t in tensors)
