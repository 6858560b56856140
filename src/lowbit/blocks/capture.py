"""Record the arguments of a block, call it with them, and observe the inputs of its linears."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blocks.added import take_added
from lowbit.blocks.stream import Batch, Stream


class Stopped(Exception):  # noqa: N818 - not an error
    """Ends a forward pass early, after a stub has recorded its call."""


class BlockStub(nn.Module):
    """A placeholder for a block: records each call and returns the hidden states unchanged.

    The model's own forward pass, with a stub in place of every block, shows which keyword arguments
    (masks, positions) each block gets. They differ within a model: sliding-window layers have other
    masks than full attention.

    block: the block to replace; the model may read its attributes.
    tuple_output: the number of values in the tuple that the block returns; 0: it returns a tensor.
    stop: whether a call raises `Stopped` instead of returning.
    others: attribute, what the stub returns besides the hidden states, by position; None elsewhere.
    """

    def __init__(self, block: nn.Module, tuple_output: int, stop: bool = False) -> None:
        super().__init__()
        self.others: dict[int, Tensor] = {}
        self._signature = inspect.signature(block.forward)
        self._block = (block,)  # in a tuple, so that its parameters are not the stub's
        self.tuple_output = tuple_output
        self.stop = stop
        self.calls: list[Batch] = []

    def __getattr__(self, name: str) -> Any:
        # Some models read an attribute of the block, such as Gemma's `attention_type`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_block" not in self.__dict__:
                raise
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs).arguments
        bound.update(bound.pop("kwargs", {}))
        name = next(iter(self._signature.parameters))  # the hidden states come first
        hidden = bound.pop(name)
        self.calls.append(Batch(hidden.detach(), dict(bound)))
        if self.stop:
            raise Stopped
        return self.output(hidden)

    def output(self, hidden: Tensor) -> Any:
        """Returns what the block returns: hidden states, alone or first in a tuple."""
        if not self.tuple_output:
            return hidden
        return (hidden, *[self.others.get(i) for i in range(1, self.tuple_output)])


def copied_around(model: nn.Module, blocks: str) -> nn.Module:
    """Returns a copy of a model that has the blocks of the model itself.

    Copying the modules of thousands of experts takes seconds.

    blocks: path of the list of blocks.
    """
    same = {id(block): block for block in model.get_submodule(blocks).children()}
    return deepcopy(model, same)


def first_argument(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the hidden states of a call of a block, which are its first argument."""
    name = next(iter(inspect.signature(block.forward).parameters))
    hidden: Tensor = args[0] if args else kwargs[name]
    return hidden


def call_block(block: nn.Module, batch: Batch) -> Tensor:
    """Returns the block's output for one batch: (batch, tokens, channels)."""
    kwargs, added = take_added(batch.kwargs)
    out = block(batch.hidden, **kwargs)
    hidden: Tensor = out[0] if isinstance(out, tuple | list) else out
    return hidden if added is None else hidden + added


@contextmanager
def observed(
    block: nn.Module, linears: Iterable[str], on_input: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Calls on_input(name, input) whenever one of the named linears runs in this context."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: on_input(name, args[0])

    handles = [
        block.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observed_gradients(
    block: nn.Module, linears: Iterable[str], on_gradient: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Calls on_gradient(name, gradient) with the gradient by each output of the named linears.

    Only calls of a linear in this context count. Their gradients are known during the way back.
    """

    def hook_for(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            if not out.requires_grad:  # what it reads does not depend on the block's input
                out = out.detach().requires_grad_(torch.is_grad_enabled())
            if out.requires_grad:
                out.register_hook(lambda gradient: on_gradient(name, gradient))
            return out

        return hook

    handles = [block.get_submodule(n).register_forward_hook(hook_for(n)) for n in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe_inputs(
    block: nn.Module,
    linears: Iterable[str],
    stream: Stream | Sequence[Batch],
    on_input: Callable[[str, Tensor], None],
    owners: Mapping[str, int] | None = None,
) -> None:
    """Runs the block over a whole stream; calls on_input(name, input) for each named linear.

    Where several processes share the batches, they get the inputs of all batches, in their order.

    owners: the process that alone gets the inputs of a linear, by the linear's name; None: all do.
    """
    if isinstance(stream, Stream) and stream.ranks.count > 1:
        _observe_shared(block, list(linears), stream, on_input, owners)
        return
    with torch.no_grad(), observed(block, linears, on_input):
        for batch in stream:
            call_block(block, batch)


def _observe_shared(
    block: nn.Module,
    linears: Sequence[str],
    stream: Stream,
    on_input: Callable[[str, Tensor], None],
    owners: Mapping[str, int] | None,
) -> None:
    def inputs(index: int) -> tuple[list[str], list[Tensor]]:
        found: list[tuple[str, Tensor]] = []
        # The block may overwrite its inputs later on.
        observe_inputs(
            block, linears, [stream[index]], lambda name, x: found.append((name, x.clone()))
        )
        return [name for name, _ in found], [x for _, x in found]

    def receivers(batch: int, names: list[str]) -> list[int | None]:
        return [None if owners is None else owners[name] for name in names]

    device, ranks = next(block.parameters()).device, stream.ranks
    for names, tensors in ranks.in_turn(len(stream), inputs, device, receivers):
        for name, x in zip(names, tensors, strict=True):
            if x is not None:
                on_input(name, x)
