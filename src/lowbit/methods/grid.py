"""The fields of a uniform grid: what RTN, GPTQ and OmniQuant share."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from lowbit.methods.method import Method
from lowbit.solvers.rounding import GridShape

ZERO_BITS = 8  # of a fine zero point


class GridMethod(Method):
    """bits: 2 to 8. group_size: input channels per scale, None for one per output row.

    symmetric: no zero points. fine_zeros: zero points of 8 bits, which lie between codes too; at 2
    bits a weight that is worth more than its 6 bits for each group.
    """

    per_linear: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric", "fine_zeros")

    bits: int = Field(4, ge=2, le=8)
    group_size: int | None = Field(None, ge=1)
    symmetric: bool = False
    fine_zeros: bool = False

    @model_validator(mode="after")
    def _check_zeros(self) -> Self:
        if self.fine_zeros and self.symmetric:
            raise ValueError("fine_zeros says how zero points are stored: symmetric has none")
        return self

    @property
    def grid_shape(self) -> GridShape:
        """What a grid is made by."""
        shift = ZERO_BITS - self.bits if self.fine_zeros else 0
        return GridShape(self.bits, self.group_size, self.symmetric, shift)
