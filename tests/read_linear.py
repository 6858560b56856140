"""A float linear in place of a packed one, so that only what is done beside rounding is seen."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lowbit.formats.dense import DenseLinear
from lowbit.formats.reading import Reading


class ReadLinear(DenseLinear):
    """A float linear that rotates its input as a uniform layer does; its values are rotated."""

    reading = Reading()

    def with_reading(self, how: Reading, shares: str | None = None) -> "ReadLinear":
        self.reading = replace(how, activation=None)
        return self

    def dequantize(self) -> Tensor:
        return self.reading.restore_weight(super().dequantize())

    def prepare(self, x: Tensor) -> Tensor:
        return self.reading.prepared(x)


def unrounded(weight: Tensor, bias: Tensor | None, *grid: Any) -> ReadLinear:
    """Stands for `lowbit.methods.packing.pack`."""
    return ReadLinear.from_weight(weight.detach(), bias)


def unrounded_with_loss(
    weight: Tensor, bias: Tensor | None, *grid: Any
) -> tuple[ReadLinear, float]:
    """Stands for `lowbit.methods.packing.pack_with_feedback`."""
    return unrounded(weight, bias), 0.0
