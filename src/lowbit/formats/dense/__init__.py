"""A float weight under another name, for a float linear beside packed ones.

transformers joins the experts of a layer into one tensor where it finds their `weight` on disk.
Some of an expert's matrices may be packed while others stay float; the float ones are therefore
stored as:

| name     | dtype           | shape     | holds              |
| -------- | --------------- | --------- | ------------------ |
| `values` | as `dtype` says | (out, in) | the weight         |
| `bias`   | as `bias` says  | (out,)    | absent where null  |

The entry in config.json, whose size is out * in * (2 or 4) bytes:

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
    """The entry of a layer; the module's docstring explains it."""

    format: Literal["dense"]
    dtype: FloatName

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        self.check_bytes(tensor_bytes(self.shape, self.dtype))
        return self


def tensor_bytes(shape: list[int] | tuple[int, int], dtype: FloatName) -> int:
    """Bytes that stand for the weight, those of `DenseLinear.weight_bytes()`: out * in * (2, 4)."""
    return shape[0] * shape[1] * getattr(torch, dtype).itemsize


class DenseLinear(QuantizedLinear):
    """A linear layer whose weight is not quantized; the module's docstring gives its bytes."""

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
        """weight: (out, in) and bias: (out,), kept in their dtypes."""
        return cls.from_tensors(weight.shape, {"values": weight, "bias": bias}, weight.dtype)

    def with_dtypes(self, weight: torch.dtype, bias: torch.dtype | None) -> Self:
        """The same layer with weight and bias cast to these dtypes."""
        if (self.bias is None) != (bias is None):
            raise ValueError(f"bias is {bias}, which does not fit {self.entry()}")
        cast = None if self.bias is None else self.bias.to(bias)
        return self.from_weight(self.values.to(weight), cast)

    def dequantize(self) -> Tensor:
        return self.values.to(torch.float32)
