"""What the backends named "cpu" of all formats share: products with the compiled kernels."""

from abc import abstractmethod
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lowbit.formats.backend import Backend
from lowbit.kernels.native import Part, Rounding, multiply_op, pack_layer, why_not

if TYPE_CHECKING:
    from lowbit.formats.base import QuantizedLinear

Layer = TypeVar("Layer", bound="QuantizedLinear")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of inputs; sums are not exact to float64


class NativeBackend(Backend[Layer]):
    """Multiplies integer codes by rounded inputs with the kernels of `lowbit.kernels.native`.

    A format says in `parts` how its weight is made of codes and scales. Inputs that the format does
    not round itself are rounded to `layer.input_bits` bits for each group of inputs.
    """

    name = "cpu"

    def supports(
        self, layer: Layer, device: torch.device, dtype: torch.dtype, tokens: int, gradients: bool
    ) -> bool:
        return device.type == "cpu" and dtype in DTYPES and not gradients and why_not() is None

    @abstractmethod
    def parts(self, layer: Layer) -> list[Part]:
        """Returns the one or two parts of the layer's weight."""

    def repack(self, layer: Layer) -> dict[str, Tensor]:
        return {"layer": pack_layer(self.parts(layer), layer.out_features)}

    def multiply(self, layer: Layer, packed: dict[str, Tensor], prepared: Tensor) -> Tensor:
        return multiply_op(prepared, [packed["layer"]], [layer.out_features])[0]


def rounding(layer: "QuantizedLinear") -> Rounding:
    """Returns how the inputs of a layer are rounded that does not round them itself."""
    return Rounding.bits(layer.input_bits)
