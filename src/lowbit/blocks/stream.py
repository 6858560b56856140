"""A stream: the inputs of a block for every calibration batch, moved from block to block."""

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

from lowbit.blocks.arguments import BlockArguments


@dataclass(frozen=True)
class Batch:
    """One call of a block.

    hidden: (batch, tokens, channels) float32
    kwargs: the other arguments; their containers belong to this call alone.
    """

    hidden: Tensor
    kwargs: dict[str, Any]


class Stream:
    """Hidden states of all calibration batches at one block, and the arguments of all blocks.

    hidden: per batch (batch, tokens, channels) float32, kept on the CPU: in memory (the tensors
        themselves, not copies), or with `folder` in one file per batch.
    arguments: the keyword arguments of all blocks, and the state that blocks hand on.
    device: where batches are moved when they are read.
    folder: where hidden states are kept on disk; None: in memory.
    block: the index of the block whose inputs these are.
    """

    def __init__(
        self,
        hidden: Iterable[Tensor],
        arguments: BlockArguments,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        block: int = 0,
    ) -> None:
        self.arguments = arguments
        self.device = torch.device(device)
        self.folder = folder
        self.block = block
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._hidden = [self._keep(i, h) for i, h in enumerate(hidden)]
        if len(self._hidden) != len(arguments):
            raise ValueError(
                f"{len(self._hidden)} batches, but keyword arguments for {len(arguments)}"
            )

    @classmethod
    def of_calls(
        cls,
        calls: Iterable[Sequence[Batch]],
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> "Stream":
        """The stream at the first block.

        calls: for every batch, what each block is called with; one batch is made at a time.
        """
        arguments = BlockArguments()

        def hidden() -> Iterator[Tensor]:
            for of_batch in calls:
                arguments.append([call.kwargs for call in of_batch])
                yield of_batch[0].hidden

        return cls(hidden(), arguments, device, folder)

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
        kwargs = self.arguments.call(self.block, index, self.device)
        return Batch(self._hidden[index].to(self.device), kwargs)

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def hidden(self) -> list[Tensor]:
        """The hidden states of every batch, on the CPU; they belong to the stream."""
        return list(self._hidden)

    @property
    def bytes(self) -> int:
        """What the hidden states take."""
        return sum(hidden.nbytes for hidden in self._hidden)

    def copy(self, folder: Path | None = None) -> "Stream":
        """A stream of its own with the same contents, on disk where a folder is given."""
        hidden = (states.clone() for states in self._hidden)
        return Stream(hidden, self.arguments.copy(), self.device, folder, self.block)

    def advance(self, call: Callable[[Batch], Tensor]) -> None:
        """Moves to the next block.

        call: runs the block on one batch and returns its output; what the block has written into
            the state that it shares with later blocks is kept.
        """
        with torch.no_grad():
            for index, batch in enumerate(self):
                self._hidden[index].copy_(call(batch))
                self.arguments.keep(self.block, index, batch.kwargs)
        self.block += 1

    def map(self, function: Callable[[Batch], Tensor]) -> "Stream":
        """A new stream of function(batch), on disk inside `folder` if this one is on disk.

        Its files go with it: each call has its own, so that two results can be held side by side.
        """
        folder = self.folder and Path(mkdtemp(prefix="mapped-", dir=self.folder))
        with torch.no_grad():
            hidden = map(function, self)
            stream = Stream(hidden, self.arguments, self.device, folder, self.block)
        if folder is not None:
            finalize(stream, rmtree, folder, ignore_errors=True)
        return stream
