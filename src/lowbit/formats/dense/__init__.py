"""The dense format: a float weight, stored under another name than `weight`.

transformers joins the experts of a layer into one tensor if it finds tensors named `weight` on
disk. Some matrices of an expert may be packed while others stay float. The float ones are therefore
stored as:

| name     | dtype           | shape     | holds              |
| -------- | --------------- | --------- | ------------------ |
| `values` | as `dtype` says | (out, in) | the weight         |
| `bias`   | as `bias` says  | (out,)    | absent where null  |

The weight takes out * in * (2 or 4) bytes. The entry in config.json:

    {"format": "dense", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "dtype": "float32" | "float16" | "bfloat16"}
"""

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.dense.reference import Reference
from lowbit.formats.entry import FloatName, LayerEntry


class DenseEntry(LayerEntry):
    """The entry of a layer in config.json; the module's docstring explains it."""

    format: Literal["dense"]
    dtype: FloatName

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        self.check_bytes(tensor_bytes(self.shape, self.dtype))
        return self


def tensor_bytes(shape: list[int] | tuple[int, int], dtype: FloatName) -> int:
    """Returns `DenseLinear.weight_bytes()` of an entry: out * in * (2 or 4)."""
    return shape[0] * shape[1] * getattr(torch, dtype).itemsize


class DenseLinear(QuantizedLinear):
    """A linear layer whose weight is not quantized; the module's docstring has its byte layout."""

    format = "dense"
    Entry = DenseEntry
    backends = (Reference(),)

    spec: DenseEntry
    values: Tensor

    def __init__(self, spec: DenseEntry) -> None:
        super().__init__(spec)
        self.add_frozen("values", (self.out_features, self.in_features), spec.dtype)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """Returns a layer with weight (out, in) and bias (out,), which keep their dtypes."""
        return cls.from_tensors(weight.shape, {"values": weight, "bias": bias}, weight.dtype)

    def with_dtypes(self, weight: torch.dtype, bias: torch.dtype | None) -> Self:
        """Returns a layer with weight and bias cast to these dtypes."""
        if (self.bias is None) != (bias is None):
            allowed = "None" if self.bias is None else "a dtype"
            raise ValueError(f"bias is {bias}: allowed is {allowed} for the layer {self.entry()}")
        cast = None if self.bias is None else self.bias.to(bias)
        return self.from_weight(self.values.to(weight), cast)

    def dequantize(self) -> Tensor:
        return self.values.to(torch.float32)
