"""The base class of the entries of layers in config.json."""

from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field

from lowbit.config import Config

Size = Annotated[int, Field(gt=0, lt=2**31)]
FloatName = Literal["float32", "float16", "bfloat16"]
ScaleName = Literal["float16", "float32"]


class Stack(Config):
    """Where a float checkpoint keeps the weight of one expert: in one tensor with all others.

    tensor: name on disk of the stacked weights.
    bias: name on disk of the stacked biases; None: the layer has none.
    start, step: of the output channels of an expert in the stack, the layer has start, start +
        step and so on, as many as its shape says.
    transposed: whether each expert's matrix is (in, out) in the stack.
    flat: whether the matrices lie one below the other in a tensor of 2 dimensions; False: the first
        of 3 dimensions counts the experts.
    """

    model_config = ConfigDict(strict=True)

    tensor: str
    bias: str | None = None
    start: int = Field(0, ge=0, lt=2**31)
    step: Size = 1
    transposed: bool = False
    flat: bool = False


class LayerEntry(Config):
    """The entry of a layer in config.json; it may come from an untrusted file.

    format: name of the layer's format.
    shape: [out_features, in_features].
    bias: dtype of the bias, "float32", "float16" or "bfloat16"; None (null in JSON): there is no
        bias.
    dtype: dtype of the original float weight, one of the same three. The key is absent if it is
        unknown, as in folders of version 1.
    transposed: whether the float checkpoint stores the weight as (in, out), like GPT-2's.
    stack: where the float checkpoint stacks the weight with those of other experts; None: it is a
        tensor of its own.
    """

    model_config = ConfigDict(strict=True)

    format: str
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    bias: FloatName | None
    dtype: FloatName | None = None
    transposed: bool = False
    stack: Stack | None = None

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """`dtype` as a torch.dtype; None if it is unknown."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    def check_bytes(self, stored: int) -> None:
        """Raises ValueError for 2**63 bytes and more.

        torch counts the bytes of every tensor, also on the meta device, in an int64.
        """
        if stored >= 2**63:
            raise ValueError(f"shape is {self.shape}: allowed are layers below 2**63 bytes")
