"""A second value that blocks return reaches the next block, in every batch of every stream."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from lowbit.blocks.capture import BlockStub, call_block
from lowbit.blocks.handed import hand_on, with_dictionary
from lowbit.blocks.stream import Batch, Stream

HANDED = (("state", 2),)
COUNT = 3


class Block(nn.Module):
    """Returns a tuple whose third value is the state for the next block."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden: Tensor, state: Tensor | None = None, *, bias: float = 0.0):
        own = hidden.sum(-1, keepdim=True) + (0 if state is None else state)
        return hidden * self.factor + own + bias, None, own


def whole(blocks: list[Block], hidden: Tensor) -> Tensor:
    state = None
    for block in blocks:
        hidden, _, state = block(hidden, state=state, bias=0.5)
    return hidden


def calls(blocks: list[Block], hidden: Tensor) -> list[Batch]:
    stubs = [BlockStub(block, 3) for block in blocks]
    state, current = None, hidden
    for stub in stubs:
        current, _, state = stub(current, state=state, bias=0.5)
    return with_dictionary([stub.calls[0] for stub in stubs], HANDED)


def test_streamed_is_whole() -> None:
    blocks = [Block(1.0 + i) for i in range(COUNT)]
    hidden = [torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    wanted = [whole(blocks, each) for each in hidden]
    stream = Stream.of_calls(calls(blocks, each.clone()) for each in hidden)
    other = stream.copy()
    for index, block in enumerate(blocks):
        hand_on(block, index, HANDED)
        copied = deepcopy(block)
        call_block(copied, stream[0])  # a call for trial changes nothing
        stream.advance(lambda batch, block=copied: call_block(block, batch))
    assert all(map(torch.equal, stream.hidden(), wanted))
    for block in blocks:
        other.advance(lambda batch, block=block: call_block(block, batch))
    assert all(map(torch.equal, other.hidden(), wanted))


def test_nothing_changes_where_nothing_is_handed_on() -> None:
    made = [Batch(torch.zeros(1), {"bias": 1.0})]
    assert with_dictionary(made, ()) is made
    block = Block(1.0)
    hand_on(block, 0, ())
    assert not block._forward_hooks and not block._forward_pre_hooks
