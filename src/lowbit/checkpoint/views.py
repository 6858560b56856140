"""Reads tensors that a folder stores in another form, such as one expert of a stack."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.reader import CheckpointReader, TensorInfo


@dataclass(frozen=True)
class Place:
    """Where one expert's matrix or bias is in a stack; see `formats.entry.Stack`."""

    start: int
    step: int
    transposed: bool
    flat: bool


@dataclass(frozen=True)
class View:
    """A tensor that is made of stored tensors.

    sources: the names on disk of the tensors that it is made of.
    make: makes it from them.
    shape: its shape.
    place: where it is in its source, if that is a stack of experts; None: it is something else.
    dtype: its dtype; None: that of the first source.
    """

    sources: tuple[str, ...]
    make: Callable[[list[Any]], Tensor]
    shape: tuple[int, ...]
    place: Place | None = None
    dtype: torch.dtype | None = None


class ViewingReader(CheckpointReader):
    """A reader that has views of tensors instead of the tensors.

    inner: the reader of the folder.
    views: attribute, the views by their names. `tensors` has them instead of their sources.
    """

    def __init__(self, inner: CheckpointReader, views: Mapping[str, View]) -> None:
        self.inner = inner
        self.folder, self.files, self.views = inner.folder, inner.files, dict(views)
        self.states = inner.states
        sources = {source for view in views.values() for source in view.sources}
        self.tensors = {n: info for n, info in inner.tensors.items() if n not in sources}
        for name, view in views.items():
            first = inner.tensors[view.sources[0]]
            self.tensors[name] = TensorInfo(first.file, view.shape, view.dtype or first.dtype)

    @property
    def stored_bytes(self) -> int:
        return self.inner.stored_bytes

    @property
    def dequantized(self) -> dict[str, int]:
        return self.inner.dequantized

    def digest(self, names: Collection[str] | None = None, cache: Path | None = None) -> str:
        if names is None:
            return self.inner.digest(None, cache)
        own = [self.views[name].sources if name in self.views else (name,) for name in names]
        return self.inner.digest({source for sources in own for source in sources}, cache)

    def read_ahead(self, names: Iterable[str]) -> None:
        own = [self.views[name].sources if name in self.views else (name,) for name in names]
        self.inner.read_ahead({source for sources in own for source in sources})

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        viewed = [name for name in names if name in self.views]
        sources = {source for name in viewed for source in self.views[name].sources}
        plain = [name for name in names if name not in self.views]
        stored = self.inner.read([*plain, *sorted(sources)])
        made = {name: stored[name] for name in plain}
        for name in viewed:
            view = self.views[name]
            made[name] = view.make([stored[source] for source in view.sources]).clone()
        return {name: tensor.contiguous() for name, tensor in made.items()}
