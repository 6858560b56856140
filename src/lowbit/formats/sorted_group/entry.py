"""The entry of a sorted_group layer in config.json, its size in bytes, and its layout."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from lowbit.config import Config
from lowbit.formats.entry import LayerEntry, ScaleName, Size
from lowbit.formats.uniform.reference import group_count
from lowbit.kernels.bits import packed_bytes

Width = Annotated[int, Field(ge=2, le=8)]
SHORT = 2**15  # up to this many inputs, their numbers fit into int16


class Activation(Config):
    """How inputs are rounded.

    bits: width of an input's code.
    symmetric: always True.
    group: number of inputs with a common scale; None: all ordinary inputs.
    """

    model_config = ConfigDict(strict=True)

    bits: Width
    symmetric: Literal[True]
    group: Size | None


class SortedGroupEntry(LayerEntry):
    """The entry of a layer in config.json; the module's docstring explains it."""

    format: Literal["sorted_group"]
    bits: Width
    group_size: Size | None
    scale_dtype: ScaleName
    salient: Annotated[int, Field(ge=0)]
    salient_dtype: Literal["float16", "float32", "int8"]
    activation: Activation | None
    permutation: Literal["stored"] | None
    shares: Annotated[str, Field(min_length=1)] | None

    @property
    def kept(self) -> int:
        """The number of inputs that are not salient."""
        return self.shape[1] - self.salient

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.kept < 1:
            raise ValueError(
                f"salient is {self.salient}: allowed with {self.shape[1]} inputs are 0 to "
                f"{self.shape[1] - 1}"
            )
        if self.activation is not None and self.activation.group != self.group_size:
            raise ValueError(
                f"activation.group is {self.activation.group}: allowed is group_size, "
                f"{self.group_size}, because inputs and weights must have the same groups"
            )
        self.check_bytes(tensor_bytes(**self.model_dump(exclude={"format", "bias", "activation"})))
        return self


def tensor_bytes(
    shape: list[int] | tuple[int, int],
    bits: int,
    group_size: int | None,
    scale_dtype: str,
    salient: int,
    salient_dtype: str,
    permutation: str | None,
    shares: str | None,
    **free: Any,
) -> int:
    """Returns `SortedGroupLinear.weight_bytes()` of the layer that an entry describes:

    out * ceil(kept * bits / 8) + out * groups * (2 or 4) + out * salient * (1, 2 or 4)

    These are the codes, the scales and the salient weights. Salient weights in int8 add
    (2 or 4) * out for their scales, and a permutation that no other layer stores adds
    (2 or 4) * in.

    free: the other fields of the entry, which take no bytes.
    """
    rows, columns = shape
    kept, width = columns - salient, getattr(torch, scale_dtype).itemsize
    total = rows * packed_bytes(kept, bits) + rows * group_count(kept, group_size) * width
    total += rows * salient * getattr(torch, salient_dtype).itemsize
    if salient and salient_dtype == "int8":
        total += rows * width
    if permutation == "stored" and shares is None:
        total += columns * index_dtype(columns).itemsize
    return total


@dataclass(frozen=True, eq=False)
class InputOrder:
    """The order and the rounding of an input, the same for all linears that read it.

    permutation: (in,) int64, the input at each position of the order; None: the order of the input.
    salient: number of inputs at the end of the order that stay float.
    group_size: size of the groups of the other inputs; None: one group.
    activation_bits: width of an input's code; None: inputs are not rounded.
    """

    permutation: Tensor | None
    salient: int
    group_size: int | None
    activation_bits: int | None


@dataclass(frozen=True, eq=False)
class SortedGroupLayout:
    """How a layer is stored.

    order: order and rounding of its inputs.
    bits: width of a weight's code.
    salient_bits: width of a salient weight: 16 (float32 if float16 would overflow) or 8.
    shares: name of the layer that stores the permutation, as `lowbit.formats.link` will look it up;
        None: this layer stores it.
    """

    order: InputOrder
    bits: int
    salient_bits: int = 16
    shares: str | None = None


def index_dtype(inputs: int) -> torch.dtype:
    """Returns the dtype of a stored permutation."""
    return torch.int16 if inputs <= SHORT else torch.int32
