"""The quantized model while it is tuned: its losses, and their gradients by its vectors."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blocks import Stream
from lowbit.blocks.backward import Tape
from lowbit.blocks.capture import call_block
from lowbit.checkpoint import QuantizedFolder
from lowbit.formats import use_backend
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.widths import entry_widths
from lowbit.load import stream
from lowbit.tuning.teacher import loss
from lowbit.tuning.vectors import CENTRED, Vector, store_vectors, vectors_in

Target = tuple[Tensor, Tensor]


class Student:
    """A quantized model whose vectors can be changed. It runs block by block, in float32.

    folder: a quantized folder.
    device: where it computes.
    place: where blocks are loaded from whenever they run, and where their inputs are kept; None:
        everything stays in memory.
    trust_remote_code: whether Python code in the folder may be run.

    vectors: attribute, all vectors by their names on disk.
    widths: attribute, the widths that count: those for which a matquant folder was trained.

    Raises ValueError if no layer has vectors.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        place: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.place = place
        self.quantized = QuantizedFolder(folder)
        self.model = stream(folder, trust_remote_code)
        self.vectors: dict[str, Vector] = {}
        self.widths = widths_of(self.quantized)
        self._blocks: dict[int, nn.Module] = {}
        self._inside: set[str] = set()  # vectors of layers
        for index in range(len(self.model.block_names)):
            self._block(index)
        self._outside = self.model.without_blocks(self.device)
        store_vectors(self._outside.model)
        self._install(self._outside.model, "")
        self._drop_unreached()
        if not any(name in self.vectors for name in self._inside):
            formats = sorted({entry["format"] for entry in self.quantized.entries.values()})
            raise ValueError(
                f"{folder} has layers in format {' and '.join(formats)} only, which have no scales "
                "that could be tuned"
            )

    @use_backend("reference")
    def divergence(self, batches: Sequence[Tensor], targets: Sequence[Sequence[Target]]) -> float:
        """Returns the mean KL(float || model) over all positions and widths, in nats.

        batches: (windows, tokens) int64 each.
        targets: for each batch, what `Teacher` keeps of its windows.
        """
        total, positions = 0.0, 0
        for tokens, target in zip(batches, targets, strict=True):
            for bits in self.widths:
                passed = self._stream(tokens)
                for index in range(len(self.model.block_names)):
                    block = self._block(index, bits)
                    passed.advance(lambda batch, block=block: call_block(block, batch))  # type: ignore[misc]
                total += self._head(tokens, passed.hidden()[0], target)[0]
                positions += tokens[:, 1:].numel()
        return total / positions

    @use_backend("reference")
    def add_gradients(self, tokens: Tensor, target: Sequence[Target]) -> float:
        """Adds the gradients of the mean divergence of one batch to the vectors, and returns it.

        tokens: (windows, tokens) int64.
        target: what `Teacher` keeps of each window.
        """
        blocks, total = range(len(self.model.block_names)), 0.0
        positions = tokens[:, 1:].numel() * len(self.widths)
        for bits in self.widths:
            tape = Tape(self._stream(tokens), self.place)
            for index in blocks:
                tape.forward(self._block(index, bits))
            found, gradient = self._head(tokens, tape.stream.hidden()[0], target, 1 / positions)
            total += found
            for index in reversed(blocks):
                tape.backward(self._block(index, bits), [gradient])
        if self.place is not None:
            shutil.rmtree(self.place, ignore_errors=True)
        for vector in self.vectors.values():
            vector.take_gradient()
        return total / positions

    def _stream(self, tokens: Tensor) -> Stream:
        folder = None if self.place is None else self.place / "now"
        return Stream.of_calls([self._outside.calls(tokens)], self.device, folder)

    def _head(
        self, tokens: Tensor, hidden: Tensor, target: Sequence[Target], weight: float | None = None
    ) -> tuple[float, Tensor]:
        """Runs what comes after the blocks.

        hidden: (..., windows, tokens, channels), the outputs of the last block.
        weight: of each position in the loss whose gradients are computed; None: of none.

        Returns the sum of the divergences, and the gradient by `hidden`, in its shape.
        """
        gradient = torch.zeros_like(hidden)

        def of_part(window: int, part: slice, logits: Tensor) -> Tensor:
            likely, logarithms = target[window]
            kept = likely[part].to(logits.device), logarithms[part].to(logits.device)
            return loss(logits, kept).sum()

        wanted = gradient if weight else None
        total = self._outside.losses(tokens[:, :-1], hidden, of_part, wanted, weight or 1.0)
        return total, gradient

    def _block(self, index: int, bits: int | None = None) -> nn.Module:
        """Returns a block that computes with the present vectors, at a width."""
        block = self._blocks.get(index)
        if block is None:
            name = self.model.block_names[index]
            block = self.model.load_block(name, self.device)
            store_vectors(block)
            self._install(block, f"{name}.")
            if self.place is None:
                self._blocks[index] = block
        for layer in block.modules() if bits is not None else ():
            if isinstance(layer, QuantizedLinear) and len(layer.widths) > 1:
                layer.set_bits(bits)  # type: ignore[arg-type]
        return block

    def _install(self, module: nn.Module, prefix: str) -> None:
        """Puts the values of vectors into a module that has just been loaded."""
        views = getattr(self.model.reader, "views", {})
        for path, inside, name in list(vectors_in(module)):
            if isinstance(inside, QuantizedLinear):
                disk = f"{inside.stored_as}.{name}"
                self._inside |= {disk} if name in inside.vectors else set()
            else:
                disk = self.model.names_to_load.get(f"{prefix}{path}.{name}", "")
                if not disk or disk in views:
                    continue
            if disk not in self.vectors:
                tensor = inside.get_parameter(name)
                info = self.model.reader.tensors.get(disk)
                stored = tensor if info is None else tensor.to(info.dtype)
                self.vectors[disk] = Vector(stored, name in CENTRED, self.device)
            inside.register_parameter(name, self.vectors[disk].value)

    def _drop_unreached(self) -> None:
        """Forgets the vectors outside of blocks that come before them, or in an image tower."""
        outside: dict[str, Any] = {
            name: vector
            for name, vector in self.vectors.items()
            if any(p is vector.value for p in self._outside.model.parameters())
        }
        token = torch.zeros(1, 1, dtype=torch.int64)
        hidden = torch.ones_like(self._outside.calls(token)[0].hidden).requires_grad_()
        logits = self._outside.logits(token, hidden, gradients=True)
        logits.sum().backward()
        for name, vector in outside.items():
            if vector.value.grad is None:
                del self.vectors[name]
            vector.value.grad = None


def widths_of(quantized: QuantizedFolder) -> tuple[int | None, ...]:
    """Returns the widths for which a folder of matquant was trained; (None,) for other folders."""
    nested = [e for e in quantized.entries.values() if len(entry_widths(e)) > 1]
    trained = sorted({width for entry in nested for width in entry["trained"]})
    return tuple(trained) if trained else (None,)
