"""Products of several linears that read the same input, computed in one call of a kernel."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lowbit.formats.base import QuantizedLinear

MOST_MISSES = 3  # products in a row that a layer did not fetch, until no more are made for it

State = tuple[Any, ...]
Multiply = Callable[[list["QuantizedLinear"], list[Tensor]], list[Tensor]]


@dataclass
class _Waiting:
    """A product that another layer's call made for a layer, until that layer is called.

    input, state: the input, and what the product depends on besides it and the weight.
    packed: the weight that it was made with.
    product: one item; none once the input has been freed or the product was fetched.
    """

    input: weakref.ref[Tensor]
    state: State
    packed: Tensor
    product: list[Tensor]


@dataclass
class _Call:
    """The last call of this thread that found no product waiting for it."""

    input: weakref.ref[Tensor]
    state: State
    layer: "weakref.ref[QuantizedLinear]"


class _Last(threading.local):
    call: _Call | None = None


_last = _Last()


class Together:
    """Multiplies by several layers at once, if they read the same input: q, k and v; gate and up.

    Which layers these are is observed, so that it does not depend on how a model names them. When a
    layer is called with the very tensor of the call before, it joins the layer of that call. From
    then on, a call of that one makes the products of all, and the others fetch theirs when they are
    called, if everything is still the same: the input (by identity and version number), the packed
    weights, and the tensors that the input is prepared with. Else they multiply themselves. So
    hooks and adapters of each layer run as ever. A layer that often does not fetch its product is
    left out.
    """

    def __init__(self) -> None:
        self._others: list[weakref.ref[QuantizedLinear]] = []
        self._waiting: _Waiting | None = None
        self._misses = 0

    def product(
        self, layer: "QuantizedLinear", x: Tensor, state: State, packed: Tensor, multiply: Multiply
    ) -> Tensor:
        """Returns the product of one layer, to which this object belongs.

        x: the input, which has a version number.
        state: all that the product depends on besides x and `packed`; the backend comes first.
        packed: the layer's packed weight.
        multiply: multiplies by layers with their packed weights.
        """
        found = self._fetch(x, state, packed)
        if found is not None:
            return found
        others = self._ready(state[0])
        products = multiply([layer, *(o for o, _ in others)], [packed, *(p for _, p in others)])
        for (other, weight), product in zip(others, products[1:], strict=True):
            other._together._keep(x, state, weight, product)
        self._observe(layer, x, state)
        return products[0]

    def _fetch(self, x: Tensor, state: State, packed: Tensor) -> Tensor | None:
        waiting = self._waiting
        if waiting is None or waiting.packed is not packed or waiting.input() is not x:
            return None
        if waiting.state != state or not waiting.product:
            return None
        self._waiting, self._misses = None, 0
        return waiting.product.pop()

    def _keep(self, x: Tensor, state: State, packed: Tensor, product: Tensor) -> None:
        if self._waiting is not None:
            self._misses += 1
        held = [product]
        self._waiting = _Waiting(weakref.ref(x, lambda _: held.clear()), state, packed, held)

    def _ready(self, backend: Any) -> list[tuple["QuantizedLinear", Tensor]]:
        """Returns the layers that joined this one and fetch their products, with their weights."""
        if not self._others:
            return []
        found, ready = [reference() for reference in self._others], []
        for layer in found:
            if layer is None or layer._together._misses >= MOST_MISSES:
                continue
            packed = layer._repacked.kept(layer, backend)
            if packed is not None:
                ready.append((layer, packed["layer"]))
        return ready

    def _observe(self, layer: "QuantizedLinear", x: Tensor, state: State) -> None:
        last = _last.call
        if last is not None and last.input() is x and last.state == state:
            first = last.layer()
            if first is not None and first is not layer:
                first._together._join(layer)
                return
        _last.call = _Call(weakref.ref(x), state, weakref.ref(layer))

    def _join(self, layer: "QuantizedLinear") -> None:
        if all(reference() is not layer for reference in self._others):
            self._others = [r for r in self._others if r() is not None] + [weakref.ref(layer)]


def has_version(x: Tensor) -> bool:
    """Returns whether a change of x can be noticed.

    Tensors of inference mode have no version number, and torch.compile must record every product.
    """
    return not torch.compiler.is_compiling() and not x.is_inference()
