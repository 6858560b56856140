"""The reference of the dense format: its arithmetic in plain torch."""

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend
from lowbit.formats.tiles import by_rows, product_dtype

if TYPE_CHECKING:
    from lowbit.formats.dense import DenseLinear


class Reference(Backend["DenseLinear"]):
    """Multiplies by the stored values, which are cast a few rows at a time if necessary."""

    name = "reference"

    def multiply(self, layer: "DenseLinear", packed: dict[str, Tensor], prepared: Tensor) -> Tensor:
        x, values = prepared.to(product_dtype(prepared)), layer.values
        if values.dtype == x.dtype:
            return functional.linear(x, values)

        def product(weight: Tensor, values: Tensor) -> Tensor:
            return functional.linear(x, weight.copy_(values))

        shape = layer.out_features, layer.in_features
        return by_rows(x, shape, product, [values], x.dtype)
