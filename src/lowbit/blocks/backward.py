"""The way back through the blocks of a model: gradients with one block in memory at a time.

On the way forward, a `Tape` keeps the inputs of every block, in memory or on disk. On the way back,
each block runs once more, with gradients, from its kept inputs. So the activations of one block
exist at a time, and the blocks themselves can be loaded one after another. A pass costs one more
forward than a whole model that keeps all activations.
"""

from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor, nn

from lowbit.blocks.arguments import Place, map_state
from lowbit.blocks.capture import call_block
from lowbit.blocks.stream import Batch, Stream

State = dict[Place, Tensor]  # by place: tensors that blocks hand to later ones beside hidden states


class Tape:
    """What a stream is at the input of each block, for the way back.

    stream: at the first block; it moves on with every block.
    folder: where the inputs of blocks are kept, and deleted on the way back; None: in memory.
    """

    def __init__(self, stream: Stream, folder: Path | None = None) -> None:
        self.stream = stream
        self.folder = folder
        self._inputs: list[Stream] = []
        self._later: list[State] = [{} for _ in range(len(stream))]

    def forward(self, block: nn.Module) -> None:
        """Keeps the block's inputs and moves the stream through it. Blocks come in their order."""
        self._inputs.append(self.stream.copy(self._place(len(self._inputs))))
        self.stream.advance(lambda batch: call_block(block, batch))

    def backward(self, block: nn.Module, gradients: Sequence[Tensor]) -> None:
        """Adds a loss's gradients to the parameters of a block. Blocks come in reverse order.

        block: the block as it was in `forward`; its parameters that require a gradient get one.
        gradients: of the loss by the block's outputs, (batch, tokens, channels) float32 for each
            batch. They are overwritten by the gradients by the block's inputs, which are those by
            the outputs of the block before.
        """
        inputs = self._inputs.pop()
        for index, batch in enumerate(inputs):
            earlier, self._later[index] = _through(
                block, batch, gradients[index].to(inputs.device), self._later[index]
            )
            gradients[index].copy_(earlier)
        if (place := self._place(len(self._inputs))) is not None:
            rmtree(place, ignore_errors=True)

    def _place(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{index:05d}"


def _through(
    block: nn.Module, batch: Batch, gradient: Tensor, later: State
) -> tuple[Tensor, State]:
    """Runs a block with gradients.

    gradient: of the loss by the block's output.
    later: gradients of the loss by the state that blocks share, as it is after the block.

    Returns the gradients by the block's input, and by that state as it is before the block.
    """
    hidden = batch.hidden.detach().requires_grad_()
    before: State = {}
    after: State = {}

    def leaf(place: Place, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        before[place] = tensor.detach().requires_grad_()
        return before[place]

    def written(place: Place, tensor: Tensor) -> Tensor:
        after[place] = tensor
        return tensor

    map_state(batch.kwargs, leaf)
    with torch.enable_grad():
        out = call_block(block, Batch(hidden, batch.kwargs))
    map_state(batch.kwargs, written)
    unchanged = {p for p, tensor in before.items() if after.get(p) is tensor}
    reached = [p for p in later if p not in unchanged and p in after and after[p].requires_grad]
    torch.autograd.backward(
        [out, *(after[p] for p in reached)], [gradient.to(out.dtype), *(later[p] for p in reached)]
    )
    earlier = {p: later[p] for p in unchanged if p in later}
    for place, tensor in before.items():
        if tensor.grad is not None:
            earlier[place] = earlier[place] + tensor.grad if place in earlier else tensor.grad
    own = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
    return own, earlier
