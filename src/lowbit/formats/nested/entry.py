"""The entry of a nested layer in config.json, and the bytes of the layer that it describes."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from lowbit.formats.entry import LayerEntry, ScaleName, Size
from lowbit.formats.uniform.reference import group_count
from lowbit.kernels.bits import packed_bytes
from lowbit.kernels.slicing import MASTER_BITS

WIDTHS = tuple(range(2, MASTER_BITS + 1))  # at which a master can run
Width = Annotated[int, Field(ge=WIDTHS[0], le=WIDTHS[-1])]
SYMMETRIC_ZERO = 128  # a multiple of every step, so that it is a zero point at every width


class NestedEntry(LayerEntry):
    """The entry of a layer in config.json; the module's docstring explains it."""

    format: Literal["nested"]
    bits: Width
    group_size: Size | None
    symmetric: bool
    extra_precision: bool
    trained: list[Width]
    resident: Literal["master", "slice"]
    top_codes: Annotated[int, Field(ge=0)] | None
    scale_dtype: ScaleName
    own_grids: list[Annotated[int, Field(ge=WIDTHS[0], lt=MASTER_BITS)]] = []

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        overflows = self.resident == "slice" and self.extra_precision and self.bits < MASTER_BITS
        if (self.top_codes is not None) != overflows:
            raise ValueError(
                f"top_codes is {self.top_codes}: it must be a number for slices below 8 bits with "
                "extra precision, and null otherwise"
            )
        if len(set(self.own_grids)) < len(self.own_grids):
            raise ValueError(f"own_grids is {self.own_grids}: each width can be there only once")
        rows, columns = self.shape
        if (self.top_codes or 0) > rows * columns:
            raise ValueError(f"top_codes is {self.top_codes}: there are {rows * columns} codes")
        self.check_bytes(tensor_bytes(**self.model_dump(exclude={"format", "bias"})))
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths at which the layer can run: all for a master, one for a slice."""
        return WIDTHS if self.resident == "master" else (self.bits,)


def tensor_bytes(
    shape: list[int] | tuple[int, int],
    bits: int,
    group_size: int | None,
    symmetric: bool,
    resident: str,
    top_codes: int | None,
    scale_dtype: str,
    own_grids: Sequence[int] = (),
    **free: Any,
) -> int:
    """Returns `NestedLinear.weight_bytes()` of the layer that an entry describes:

    out * ceil(in * b / 8) + ceil(top_codes / 8) + (out * groups * (2 or 4) + groups * out) * grids

    These are the codes (b = 8 for a master, else bits), the overflow if there is one, the scales (2
    for float16) and, unless symmetric, the zeros; grids is 1 + the number of own_grids.

    free: the other fields of the entry, which take no bytes.
    """
    rows, columns = shape
    groups = group_count(columns, group_size)
    codes = rows * packed_bytes(columns, MASTER_BITS if resident == "master" else bits)
    scales = rows * groups * getattr(torch, scale_dtype).itemsize
    zeros = 0 if symmetric else groups * rows
    grids = (scales + zeros) * (1 + len(own_grids))
    return codes + packed_bytes(top_codes or 0, 1) + grids
