"""The keyword arguments of blocks: masks, positions, and state that blocks share.

Some models pass one mutable container (a dict, a list) to all blocks: an early block writes to it,
and later blocks read it (Gemma 3n: keys and values that several layers share). Such a container
belongs to one batch of one stream, and every block of that batch gets the same one.
"""

from collections.abc import Callable, MutableMapping, MutableSequence, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

CONTAINERS = (MutableMapping, MutableSequence)
Place = tuple[Any, ...]  # the keys that lead from the keyword arguments to a tensor


class BlockArguments:
    """The keyword arguments of every block for every batch, without the hidden states.

    Each call of a block gets copies of the containers, so that a block can be called for trial.
    `keep` stores what a call has written to them.
    """

    def __init__(self) -> None:
        self._blocks: list[list[dict[str, Any]]] = []  # [block][batch]

    @classmethod
    def of_one_block(cls, batches: Sequence[dict[str, Any]]) -> "BlockArguments":
        """Returns the arguments of a single block.

        batches: the block's keyword arguments for each batch.
        """
        made = cls()
        for kwargs in batches:
            made.append([kwargs])
        return made

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._blocks[0]) if self._blocks else 0

    def append(self, calls: Sequence[dict[str, Any]]) -> None:
        """Adds one batch.

        Tensors that are equal to those of the first batch are stored once.

        calls: the keyword arguments of each block, from one forward pass of the model.
        """
        self._blocks = self._blocks or [[] for _ in calls]
        containers = _Containers()
        for batches, kwargs in zip(self._blocks, calls, strict=True):
            first = batches[0] if batches else {}
            own = {key: containers.copy(value) for key, value in kwargs.items()}
            batches.append({key: _once(first.get(key), value) for key, value in own.items()})

    def copy(self) -> "BlockArguments":
        """Returns the same arguments with separate containers, for another stream."""
        made = BlockArguments()
        made._blocks = [[] for _ in self._blocks]
        for batch in range(len(self)):
            containers = _Containers()
            for batches, other in zip(self._blocks, made._blocks, strict=True):
                other.append({k: containers.copy(value) for k, value in batches[batch].items()})
        return made

    def call(self, block: int, batch: int, device: torch.device) -> dict[str, Any]:
        """Returns the keyword arguments of one call, on a device; {} after the last block."""
        if block == len(self._blocks):
            return {}
        containers = _Containers(lambda tensor: tensor.to(device))
        return {k: containers.copy(value) for k, value in self._blocks[block][batch].items()}

    def keep(self, block: int, batch: int, used: dict[str, Any]) -> None:
        """Stores what a call has written to its containers, for later blocks to read.

        used: the arguments that `call` returned, after the block has run. Their tensors are kept on
            the CPU, in memory.
        """
        containers = _Containers(lambda tensor: tensor.detach().to("cpu"))
        seen: set[int] = set()
        for key, value in self._blocks[block][batch].items():
            _take_over(value, used[key], containers, seen)


def map_state(kwargs: dict[str, Any], visit: Callable[[Place, Tensor], Tensor]) -> None:
    """Replaces the tensors in the containers of one call by what `visit` returns for them.

    kwargs: the keyword arguments, as `BlockArguments.call` returns them. Tensors outside of
        containers are left alone, since no other block writes them.
    visit: called with the place of a tensor, the keys that lead to it, and the tensor.
    """
    seen: set[int] = set()
    for key, value in kwargs.items():
        kwargs[key] = _mapped(value, (key,), False, visit, seen)


def _mapped(
    value: Any, place: Place, inside: bool, visit: Callable[[Place, Tensor], Tensor], seen: set[int]
) -> Any:
    """inside: whether the value is in a container"""
    if isinstance(value, Tensor):
        return visit(place, value) if inside else value
    if isinstance(value, tuple):
        parts = [_mapped(v, (*place, i), inside, visit, seen) for i, v in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, CONTAINERS) and id(value) not in seen:
        seen.add(id(value))
        for key, part in _items(value):
            value[key] = _mapped(part, (*place, key), True, visit, seen)
    return value


def move(value: Any, device: torch.device) -> Any:
    """Returns a copy of nested tuples and containers with all tensors on a device."""
    return _Containers(lambda tensor: tensor.to(device)).copy(value)


class _Containers:
    """Copies nested tuples and containers; a container that occurs twice is copied once.

    tensor: maps each tensor inside to the one in the copy.
    """

    def __init__(self, tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self._tensor = tensor
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []  # keeps them alive, so that ids stay unique

    def copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, tuple):
            parts = [self.copy(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if not isinstance(value, CONTAINERS):
            return value
        if id(value) not in self._copies:
            self._originals.append(value)
            made = self._copies[id(value)] = copy(value)  # registered first: it may contain itself
            for key, part in _items(value):
                made[key] = self.copy(part)
        return self._copies[id(value)]


def _once(first: Any, value: Any) -> Any:
    """Returns the value, with tensors that equal those of the first batch replaced by these.

    Containers are never shared, since each batch writes to its own.
    """
    if isinstance(value, Tensor):
        return first if isinstance(first, Tensor) and _equal(first, value) else value
    if isinstance(value, tuple) and isinstance(first, tuple) and len(value) == len(first):
        parts = [_once(a, b) for a, b in zip(first, value, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def _take_over(kept: Any, used: Any, containers: _Containers, seen: set[int]) -> None:
    """Updates the containers in `kept` to the contents of `used`, which was copied from them."""
    if isinstance(kept, tuple):
        for mine, theirs in zip(kept, used, strict=True):
            _take_over(mine, theirs, containers, seen)
    if not isinstance(kept, CONTAINERS) or id(kept) in seen:
        return
    seen.add(id(kept))
    before, after = dict(_items(kept)), dict(_items(used))
    for key in reversed([key for key in before if key not in after]):
        del kept[key]
    for key, value in after.items():
        mine = before.get(key)
        if isinstance(mine, CONTAINERS) and type(mine) is type(value):
            _take_over(mine, value, containers, seen)
        elif isinstance(kept, MutableSequence) and key == len(kept):
            kept.append(containers.copy(value))
        else:
            kept[key] = containers.copy(value)


def _items(container: Any) -> list[tuple[Any, Any]]:
    """Returns the (key, value) pairs of a dict or the (index, value) pairs of a list."""
    mapping = isinstance(container, MutableMapping)
    return list(container.items() if mapping else enumerate(container))
