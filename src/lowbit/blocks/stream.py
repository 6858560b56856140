"""A stream: the inputs of one block for every calibration batch, in memory or on disk."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One call of a block: `hidden` (batch, tokens, channels) float32 and the other arguments."""

    hidden: Tensor
    kwargs: dict[str, Any]


class Stream:
    """Hidden states of all calibration batches, with the keyword arguments of one block.

    hidden: per batch (batch, tokens, channels) float32, kept on the CPU: in memory (the tensors
    themselves, not copies), or with `folder` in one file per batch. kwargs: per batch, what this
    block is called with besides. Batches are moved to `device` when they are read.
    """

    def __init__(
        self,
        hidden: Iterable[Tensor],
        kwargs: Sequence[dict[str, Any]],
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.kwargs = list(kwargs)
        self.device = torch.device(device)
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._hidden = [self._keep(i, h) for i, h in enumerate(hidden)]
        if len(self._hidden) != len(kwargs):
            raise ValueError(
                f"{len(self._hidden)} batches, but keyword arguments for {len(kwargs)}"
            )

    def _keep(self, index: int, hidden: Tensor) -> Tensor:
        hidden = hidden.detach().to("cpu", torch.float32)
        if self.folder is None:
            return hidden
        shape, path = hidden.shape, str(self.folder / f"{index:05d}.f32")
        with open(path, "wb") as file:  # a full disk is an error here, but a SIGBUS once mapped
            os.posix_fallocate(file.fileno(), 0, max(1, hidden.nbytes))
        mapped = torch.from_file(path, shared=True, size=hidden.numel(), dtype=torch.float32)
        return mapped.view(shape).copy_(hidden)

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, index: int) -> Batch:
        return Batch(self._hidden[index].to(self.device), move(self.kwargs[index], self.device))

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def replace(self, index: int, hidden: Tensor) -> None:
        """Overwrites one batch; its shape stays."""
        self._hidden[index].copy_(hidden.detach())

    def map(self, function: Callable[[Batch], Tensor]) -> "Stream":
        """A new stream of function(batch), on disk inside `folder` if this one is on disk.

        Its files go with it: each call has its own, so that two results can be held side by side.
        """
        folder = self.folder and Path(mkdtemp(prefix="mapped-", dir=self.folder))
        with torch.no_grad():
            stream = Stream(map(function, self), self.kwargs, self.device, folder)
        if folder is not None:
            finalize(stream, rmtree, folder, ignore_errors=True)
        return stream


def move(value: Any, device: torch.device) -> Any:
    """Moves the tensors inside tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(move(v, device) for v in value)
    if isinstance(value, dict):
        return {k: move(v, device) for k, v in value.items()}
    return value
