"""Backends: the ways in which layers multiply by their weight. New kernels are added as backends.

A format lists its backends in order of preference, with the reference last. Each backend is one
class in one file. A forward runs the first backend that supports the call, unless `lowbit.backend`
forces one by name.
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
    """One way to multiply by the weight of a format's layers. A backend has no state."""

    name: ClassVar[str]  # what `lowbit.backend` and `lowbit inspect` call it

    def supports(
        self, layer: Layer, device: torch.device, dtype: torch.dtype, tokens: int, gradients: bool
    ) -> bool:
        """Whether this backend can run a forward of the layer; a reference can run every forward.

        It must not read the layer's tensors, which may be on the meta device.

        device: device of the input and the layer.
        dtype: dtype of the input.
        tokens: rows of the input.
        gradients: whether the result must have a gradient.
        """
        return True

    def repack(self, layer: Layer) -> dict[str, Tensor]:
        """Derives tensors that `multiply` needs from the layer's own tensors and entry.

        They are cached in the layer, but are not part of its state dict. They are derived again
        when the layer's tensors or its entry change; see `lowbit.formats.repacked`.
        """
        return {}

    def prepare(self, layer: Layer, x: Tensor) -> Tensor:
        """Returns the input as `multiply` reads it: (..., in_features) -> (..., width)."""
        return layer.prepared(x)

    def product(self, layer: Layer, x: Tensor) -> Tensor:
        """Multiplies the input of a forward by the layer's weight, without the bias.

        x: (..., in_features), at least one token.

        Returns (tokens, out_features) or (..., out_features).
        """
        prepared = self.prepare(layer, x)
        rows = prepared.reshape(-1, prepared.shape[-1])
        return self.multiply(layer, layer._repacked.of(layer, self), rows)

    @abstractmethod
    def multiply(self, layer: Layer, packed: dict[str, Tensor], prepared: Tensor) -> Tensor:
        """Multiplies by the layer's weight, without the bias.

        packed: the result of `repack`.
        prepared: (tokens, width), the result of `prepare`; at least one token.

        Returns (tokens, out_features) of any float dtype; `forward` casts it to the input's dtype.
        """


_forced: ContextVar[str | None] = ContextVar("lowbit_backend", default=None)


@torch.compiler.assume_constant_result  # the compiler cannot trace a context variable
def forced() -> str | None:
    """Returns the name of the backend that `force` has set; None: layers choose their own."""
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
    """Returns the backend that runs a forward; the arguments are those of `Backend.supports`.

    Raises ValueError if a backend is forced and cannot run it.
    """
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
