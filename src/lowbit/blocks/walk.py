"""One step of a walk over the blocks of a model: a block, and the streams at its input."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, nn

from lowbit.blocks.capture import call_block
from lowbit.blocks.stream import Batch, Stream


@dataclass(frozen=True, kw_only=True)
class Step:
    """A visit to one block.

    index: of the block, from 0.
    name: its path in the model, as "model.layers.3".
    block: its weights in float32; `advance` uses it up.
    streams: its inputs, by the name of the stream.
    """

    index: int
    name: str
    block: nn.Module
    streams: Mapping[str, Stream]

    def advance(
        self,
        prepare: Callable[[nn.Module, str], None] = lambda block, stream: None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """Moves every stream through the block, to the input of the next one.

        prepare: called with a copy of the block and the name of a stream; it changes the copy into
            what that stream passes through. The last stream gets the block itself.
        on_batch: called after every batch.
        """
        last = next(reversed(list(self.streams)), None)
        for name, stream in self.streams.items():
            passed = self.block if name == last else deepcopy(self.block)
            prepare(passed, name)

            def call(batch: Batch, block: nn.Module = passed) -> Tensor:
                out = call_block(block, batch)
                on_batch()
                return out

            stream.advance(call)
