"""Branches: measures the loss of each unit at each width, while a float model is read once.

A branch is the float model with the linears of one unit rounded to one width. Up to the block of
this unit its hidden states are those of the float model. From there on they are computed beside
them. So one walk over the blocks measures all units at all widths on the same text, and one block
is in memory at a time. Running the model once for each unit and width would take twice the time,
and the whole model in memory.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowbit.blocks import Batch, Stream
from lowbit.blocks.capture import call_block
from lowbit.blocks.install import install, replace_module
from lowbit.eval.divergence import LOGITS, kl_divergence
from lowbit.models.streamed import ModelWithoutBlocks

AT_ONCE = 4  # windows in a batch


class Branch(NamedTuple):
    """The model in which the linears of one unit have one width. unit: its index."""

    unit: int
    width: float


class Branches:
    """The hidden states of the float model, and those of all branches.

    windows: (windows, tokens) int64, the text.
    stream: the float model's hidden states, with AT_ONCE windows in a batch. The caller moves it
        from block to block, after `open` and `advance`.
    folder: where the hidden states of branches are kept; None: in memory.
    on_batch: called after every batch of a branch that ran through a block.
    """

    def __init__(
        self,
        windows: Tensor,
        stream: Stream,
        folder: Path | None = None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.windows = windows
        self.stream = stream
        self.folder = folder
        self.on_batch = on_batch
        self._streams: dict[Branch, Stream] = {}

    def open(self, branch: Branch, block: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        """Begins a branch at the block that the float stream is at.

        block: the float block; it is the same afterwards.
        linears: the rounded linears of the unit, by their names in the block.
        """
        place = None if self.folder is None else self.folder / f"{branch.unit}-{branch.width:g}"
        own = self.stream.copy(place)
        kept = {name: block.get_submodule(name) for name in linears}
        try:
            install(block, linears, {}, {})
            self._advance(own, block)
        finally:
            for name, linear in kept.items():
                replace_module(block, name, linear)
        self._streams[branch] = own

    def advance(self, block: nn.Module) -> None:
        """Moves the branches that began in earlier blocks through a float block."""
        for stream in self._streams.values():
            self._advance(stream, block)

    def _advance(self, stream: Stream, block: nn.Module) -> None:
        def call(batch: Batch) -> Tensor:
            out = call_block(block, batch)
            self.on_batch()
            return out

        stream.advance(call)

    def losses(self, outside: ModelWithoutBlocks, vocabulary: int) -> dict[Branch, float]:
        """Returns the mean KL(float model || branch) over all predicted tokens, in nats.

        outside: the parts of the model outside its blocks, with the output layer.
        vocabulary: the number of tokens that have logits; they are computed a few at a time.

        Raises ValueError if predictions are not finite.
        """
        sums = dict.fromkeys(self._streams, 0.0)
        hidden = self.stream.hidden()
        of_branches = {branch: stream.hidden() for branch, stream in self._streams.items()}
        for index, tokens in enumerate(self.windows.split(AT_ONCE)):
            at_once = max(1, LOGITS // (vocabulary * len(tokens)))
            last = tokens.shape[1] - 1  # nothing follows the last token
            for start in range(0, last, at_once):
                part = slice(start, min(start + at_once, last))
                expected = _predictions(outside, tokens, hidden[index], part)
                for branch, states in of_branches.items():
                    predicted = _predictions(outside, tokens, states[index], part)
                    kl = kl_divergence(expected, predicted).double().sum()
                    sums[branch] += float(kl)
        if not all(map(math.isfinite, sums.values())):
            raise ValueError(
                "the model's predictions on this text are not numbers: check the model"
            )
        windows, length = self.windows.shape
        return {branch: loss / (windows * (length - 1)) for branch, loss in sums.items()}


def _predictions(
    outside: ModelWithoutBlocks, tokens: Tensor, hidden: Tensor, part: slice
) -> Tensor:
    """Returns the logarithms of all predicted probabilities of a part of the tokens.

    tokens, hidden: (batch, tokens) and (batch, tokens, channels).

    Returns (batch, tokens of the part, vocabulary) float32.
    """
    with torch.no_grad():
        logits = outside.logits(tokens[:, part], hidden[:, part])
    return torch.log_softmax(logits.float(), -1)
