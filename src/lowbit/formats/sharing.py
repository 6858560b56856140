"""A cache of the prepared input, for several linears that read the same input."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.device import current_stream, is_recorded

if TYPE_CHECKING:
    from lowbit.formats.base import QuantizedLinear


class LastInput:
    """Caches what the owner's `prepare` returned for its last input, for the layers that share it.

    The input is recognized by its identity and version number and held by a weak reference: when it
    is freed, the cached result is freed too. Nothing is cached, and every layer computes the result
    again, if

    - the result needs a gradient;
    - a change of the input could not be noticed: tensors of inference mode have no version number;
    - a CUDA graph or torch.compile is recording, because the computation must then be recorded.

    Threads may overwrite each other's cached result. That costs time but is never wrong.
    """

    def __init__(self) -> None:
        self._kept: tuple[weakref.ref[Tensor], tuple[Any, ...], list[Tensor]] | None = None

    def prepared(self, x: Tensor, owner: "QuantizedLinear") -> Tensor:
        """Returns owner.prepare(x), from the cache if x is the same input as in the last call."""
        state = _state(x, owner)
        if state is None:
            return owner.prepare(x)
        kept = self._kept
        if kept is not None and kept[0]() is x and kept[1] == state:
            return kept[2][0]
        made = owner.prepare(x)
        if not made.requires_grad and made is not x:  # x would keep itself alive
            held = [made]
            self._kept = weakref.ref(x, lambda _: held.clear()), state, held
        return made


def check_owner(layer: "QuantizedLinear", owner: "QuantizedLinear") -> None:
    """Raises ValueError if a layer cannot use the tensors of another one."""
    if owner.shares is not None:
        raise ValueError(
            f"it shares with {layer.shares}, which itself shares with {owner.shares}: name the "
            "layer that holds the tensors"
        )
    if (layer.format, layer.in_features) != (owner.format, owner.in_features):
        raise ValueError(
            f"it is a {layer.format} layer of {layer.in_features} inputs, but it shares with "
            f"{layer.shares}, a {owner.format} layer of {owner.in_features} inputs"
        )
    for field in layer.shared_fields:
        here, there = getattr(layer.spec, field), getattr(owner.spec, field)
        if here != there:
            raise ValueError(
                f"{field} is {here}, but {there} in {layer.shares}, with which it shares tensors"
            )


def _state(x: Tensor, owner: "QuantizedLinear") -> tuple[Any, ...] | None:
    """Returns all that the result depends on besides the identity of x; None: do not cache it."""
    parameters = owner.shared_tensors()
    if torch.compiler.is_compiling() or any(t.is_inference() for t in (x, *parameters)):
        return None
    if any(parameter.requires_grad for parameter in parameters):
        return None
    if is_recorded(x):
        return None
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    tensors = tuple((id(parameter), parameter._version) for parameter in parameters)
    return (x._version, current_stream(x), *modes, *tensors)
