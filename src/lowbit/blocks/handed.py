"""Values that a block hands to the next block besides the hidden states.

Some models pass a second value from block to block: block i returns (hidden, value), and block
i + 1 takes the value as a keyword argument (the router states of Zaya, the chosen tokens of a
sparse attention). Such values belong to one batch of one stream, like the state in
`BlockArguments`: the keyword arguments of all blocks hold one dictionary under HANDED. Block i
takes the values with the key i, and puts those for the next block there with the key i + 1.
"""

from typing import Any

from torch import nn

from lowbit.blocks.stream import Batch

HANDED = "handed"  # the key of the dictionary in the keyword arguments; no argument of a block
Handed = tuple[tuple[str, int], ...]  # the argument, and its position in what blocks return


def with_dictionary(calls: list[Batch], handed: Handed) -> list[Batch]:
    """Returns the calls of all blocks in one forward pass, with one dictionary for all of them.

    The first block gets what the model itself gives to it.
    """
    if not handed:
        return calls
    names = [name for name, _ in handed]
    values = {0: {name: calls[0].kwargs.get(name) for name in names}}
    made = []
    for call in calls:
        own = {key: value for key, value in call.kwargs.items() if key not in names}
        made.append(Batch(call.hidden, own | {HANDED: values}))
    return made


def hand_on(block: nn.Module, index: int, handed: Handed) -> None:
    """Makes a block take its values from the dictionary, and put there what it returns.

    index: the index of the block, from 0.
    """
    if handed:
        block.register_forward_pre_hook(_Take(index), with_kwargs=True)
        block.register_forward_hook(_Put(index, handed))


class _Take:
    """A hook that is a class, so that copies of a block have it too."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = kwargs.get(HANDED, {})
        block.__dict__[HANDED] = values
        own = {key: value for key, value in kwargs.items() if key != HANDED}
        return args, own | values.get(self.index, {})


class _Put:
    def __init__(self, index: int, handed: Handed) -> None:
        self.index, self.handed = index, handed

    def __call__(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        values = block.__dict__.pop(HANDED)
        values.pop(self.index - 1, None)  # no later block reads it
        values[self.index + 1] = {name: out[position] for name, position in self.handed}
