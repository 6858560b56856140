"""How layers multiply by their weight: the seam at which kernels are added.

A format lists its backends in order of preference, one class in one file each, and the reference
last. A forward runs the first that supports the call, unless `lowbit.backend` forces one by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lowbit.formats.base import QuantizedLinear

Layer = TypeVar("Layer", bound="QuantizedLinear")


class Backend(ABC, Generic[Layer]):
    """One way to multiply by the weight of a format's layers. It has no state of its own."""

    name: ClassVar[str]  # what `lowbit.backend` and `lowbit inspect` call it

    def supports(
        self, layer: Layer, device: torch.device, dtype: torch.dtype, tokens: int, gradients: bool
    ) -> bool:
        """Whether this backend can run a forward of the layer; a reference can run all.

        It must not read the layer's tensors, which may be on the meta device.

        device: where input and layer are.
        dtype: of the input.
        tokens: how many rows the input has.
        gradients: whether the result must have a gradient.
        """
        return True

    def repack(self, layer: Layer) -> dict[str, Tensor]:
        """Tensors that `multiply` needs and that follow from the layer's own tensors and entry.

        They are kept with the layer, but not in its state dict, and made anew when the layer's
        tensors or its entry change; see `lowbit.formats.repacked`.
        """
        return {}

    @abstractmethod
    def multiply(self, layer: Layer, packed: dict[str, Tensor], prepared: Tensor) -> Tensor:
        """The product with the layer's weight, without the bias.

        packed: what `repack` made.
        prepared: (tokens, width), what the layer's `prepare` made of the input; at least one token.
        Returns (tokens, out_features) of any float dtype, which is then cast to that of the input.
        """


_forced: ContextVar[str | None] = ContextVar("lowbit_backend", default=None)


@torch.compiler.assume_constant_result  # the compiler cannot trace a context variable
def forced() -> str | None:
    """The name of the backend that every layer must run, if there is one."""
    return _forced.get()


@contextmanager
def force(name: str) -> Iterator[None]:
    """Forces a backend in this thread; see `lowbit.backend`, which also checks the name."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(
    layer: "QuantizedLinear",
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    gradients: bool,
) -> Backend[Any]:
    """The backend that runs such a forward. Raises ValueError where a forced one cannot."""
    name = forced()
    for backend in layer.backends:
        if name in (None, backend.name) and backend.supports(
            layer, device, dtype, tokens, gradients
        ):
            return backend
    able = [b.name for b in layer.backends if b.supports(layer, device, dtype, tokens, gradients)]
    call = f"{tokens} tokens of {str(dtype).removeprefix('torch.')} on {device.type}"
    call += " with gradients" if gradients else ""
    raise ValueError(
        f"backend {name!r} does not run this {layer.format} layer for {call}: allowed are "
        f"{', '.join(able)}"
    )
