"""What config.json says about a layer of the sorted_group format, and how many bytes it takes."""

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
SHORT = 2**15  # inputs whose numbers fit into int16


class Activation(Config):
    """How inputs are rounded."""

    model_config = ConfigDict(strict=True)

    bits: Width
    symmetric: Literal[True]
    group: Size | None


class SortedGroupEntry(LayerEntry):
    """The entry of a layer; the module's docstring explains it."""

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
        """Inputs that are no salient ones."""
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
                f"{self.group_size}, so that both have one scale for each sum"
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
    """Bytes that stand for the weight, those of `SortedGroupLinear.weight_bytes()`:

    out * ceil(kept * bits / 8) + out * groups * (2 or 4) + out * salient * (1, 2 or 4)

    that is codes, scales and salient weights; and (2 or 4) * out for the scales of salient codes
    and (2 or 4) * in for a permutation that no other layer has. free: what takes no bytes.
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
    """What linears that read one input have in common.

    permutation: (in,) int64, the input at each place; None: their own order. salient: how many at
    the end stay float. group_size: of all others. activation_bits: None leaves inputs unrounded.
    """

    permutation: Tensor | None
    salient: int
    group_size: int | None
    activation_bits: int | None


@dataclass(frozen=True, eq=False)
class SortedGroupLayout:
    """How a layer is stored.

    order: of its inputs.
    bits: of a code.
    salient_bits: of a salient weight: 16 (float32 where float16 would overflow) or 8.
    shares: the name of the layer that has the permutation, where `lowbit.formats.link` must find
        it; None: this one has it.
    """

    order: InputOrder
    bits: int
    salient_bits: int = 16
    shares: str | None = None


def index_dtype(inputs: int) -> torch.dtype:
    return torch.int16 if inputs <= SHORT else torch.int32
