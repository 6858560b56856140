"""Multiplies by the dequantized weight, for half precision on a GPU."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend

if TYPE_CHECKING:
    from lowbit.formats.binary import BinaryLinear


class Weight(Backend["BinaryLinear"]):
    """Dequantizes the weight, in the order of the prepared input, and multiplies by it.

    The reference computes sums that are larger than the result. They can exceed the range of half
    precision, and on a GPU float32 takes many times as long.
    """

    name = "weight"

    def supports(
        self,
        layer: "BinaryLinear",
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        gradients: bool,
    ) -> bool:
        return device.type != "cpu" and dtype in (torch.float16, torch.bfloat16)

    def multiply(
        self, layer: "BinaryLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        return functional.linear(prepared, layer.ordered().to(prepared.dtype))
