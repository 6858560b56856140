"""The work on an input that several linears read, done once for all of them."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lowbit.formats.base import QuantizedLinear


class LastInput:
    """What the owner of a group made of its last input, for the other members of the group.

    The input is known again by its identity and version, and held weakly: when it goes, so does
    what was made of it. Nothing is kept that needs a gradient, nor where the next member could not
    be sure that the input is unchanged (tensors of inference mode have no version) or that the work
    would be part of what is being recorded (CUDA graphs, torch.compile): it is then done again.
    Threads may replace each other's, which costs time but is never wrong.
    """

    def __init__(self) -> None:
        self._kept: tuple[weakref.ref[Tensor], tuple[Any, ...], list[Tensor]] | None = None

    def prepared(self, x: Tensor, owner: "QuantizedLinear") -> Tensor:
        """owner.prepare(x), or what it gave before."""
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


def _state(x: Tensor, owner: "QuantizedLinear") -> tuple[Any, ...] | None:
    """All that the result depends on beside the identity of x; None if that cannot be told."""
    parameters = owner.shared_tensors()
    if torch.compiler.is_compiling() or any(t.is_inference() for t in (x, *parameters)):
        return None
    if any(parameter.requires_grad for parameter in parameters):
        return None
    stream = None
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(x.device)
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    tensors = tuple((id(parameter), parameter._version) for parameter in parameters)
    return (x._version, stream, *modes, *tensors)
