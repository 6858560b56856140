"""The vectors of a quantized model that are tuned, and their rounding to the stored dtype."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowbit.formats import link
from lowbit.formats.base import QuantizedLinear

# Vectors that may cross zero, whose steps are relative to the size of the whole vector.
CENTRED = ("bias", "weight", "row_mean")


class Vector:
    """One vector: its stored values, and the change that is learned.

    The model computes with `value`, which is stored + unit * change, rounded to the stored dtype.
    The gradient passes straight through the rounding.

    stored: the vector of the quantized model, in its stored dtype.
    centred: False: steps are relative to each value, so that values keep their sign. True: relative
        to the size of the vector where that is larger, as for biases, which may be 0.
    device: where the model computes.

    value: attribute, the parameter that the modules of the model hold, float32.
    change: attribute, the parameter that the optimiser steps, float32; 0 at the start.
    """

    def __init__(self, stored: Tensor, centred: bool, device: torch.device | str = "cpu") -> None:
        self.dtype = stored.dtype
        self._start = stored.detach().to(device, torch.float32)
        self._unit = self._start.abs()
        if centred:
            size = float(self._start.square().mean().sqrt())
            self._unit = self._unit.clamp(min=size or 1.0)
        self.change = nn.Parameter(torch.zeros_like(self._start))
        self.value = nn.Parameter(self._start.clone())

    def rounded(self) -> Tensor:
        """Returns the present values in the stored dtype."""
        values = self._start + self._unit * self.change.detach()
        most = torch.finfo(self.dtype).max
        return values.clamp(-most, most).to(self.dtype)

    def refresh(self) -> None:
        """Makes the model compute with the present values."""
        with torch.no_grad():
            self.value.copy_(self.rounded())

    def take_gradient(self) -> None:
        """Moves the gradient of `value` to `change`."""
        gradient, self.value.grad = self.value.grad, None
        self.change.grad = None if gradient is None else gradient * self._unit


def store_vectors(module: nn.Module) -> None:
    """Replaces the layers inside a module whose vectors are not all stored, and links all again."""
    layers: dict[str, QuantizedLinear] = {}
    for path, layer in _layers(module):
        made = layer.with_vectors()
        if made is not layer:
            made.stored_as, made.float_dtype = layer.stored_as, layer.float_dtype
            parent, _, attribute = path.rpartition(".")
            setattr(module.get_submodule(parent), attribute, made)
        layers[made.stored_as or path] = made
    link(layers)


def vectors_in(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields the vectors of a module: the path of the module that has one, that module, its name.

    These are the vectors of quantized layers, and weights and biases with one dimension: those of
    norms, and the biases of float linears.
    """
    for path, inside in module.named_modules():
        layer = isinstance(inside, QuantizedLinear)
        names = (*inside.vectors, "bias") if isinstance(inside, QuantizedLinear) else CENTRED[:2]
        for name in names:
            tensor = inside._parameters.get(name)
            if tensor is None or tensor.is_meta or not tensor.is_floating_point():
                continue
            if layer or tensor.dim() == 1:
                yield path, inside, name


def _layers(module: nn.Module) -> list[tuple[str, QuantizedLinear]]:
    return [(n, m) for n, m in module.named_modules() if isinstance(m, QuantizedLinear)]
