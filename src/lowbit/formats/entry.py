"""What config.json says about every layer, whatever its format."""

from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field

from lowbit.config import Config

Size = Annotated[int, Field(gt=0, lt=2**31)]
FloatName = Literal["float32", "float16", "bfloat16"]
ScaleName = Literal["float16", "float32"]


class LayerEntry(Config):
    """A layer's entry; it may come from an untrusted file.

    format: the name of its format.
    shape: [out_features, in_features].
    bias: the dtype of the bias, "float32", "float16" or "bfloat16"; None (null in JSON): there is
        no bias.
    dtype: the dtype of the float weight that the layer stands for, one of the same three; the key
        is absent where it is not known, as in folders of version 1.
    """

    model_config = ConfigDict(strict=True)

    format: str
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    bias: FloatName | None
    dtype: FloatName | None = None

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """`dtype` as torch has it."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    def check_bytes(self, stored: int) -> None:
        """torch counts the bytes of a tensor, a meta tensor too, in an int64."""
        if stored >= 2**63:
            raise ValueError(f"shape is {self.shape}: allowed are layers below 2**63 bytes")
