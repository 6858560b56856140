"""The fields that methods with uniform grids share: RTN, GPTQ and OmniQuant."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lowbit.formats.uniform import tensor_bytes
from lowbit.methods.method import Method
from lowbit.solvers.rounding import GridShape

WHOLE_ROW = -1  # how other tools write one group per row


def _group_size(value: Any) -> Any:
    """Returns None for -1. Raises ValueError for other numbers below 1."""
    if isinstance(value, int) and value < 1 and value != WHOLE_ROW:
        raise ValueError(
            f"should be a positive number of inputs, or none or -1 for all inputs of a row "
            f"(got {value})"
        )
    return None if value == WHOLE_ROW else value


GroupSize = Annotated[int | None, BeforeValidator(_group_size)]  # of a field; -1 becomes None
ZERO_BITS = 8  # bits of a zero point if fine_zeros is set
FineZeros = bool | Literal["auto"]
FINE_ZEROS = (
    "Whether zero points have 8 bits, so that they can lie between two codes, which costs 8 - bits "
    'for each group; "auto": at 2 bits; GPTQ and other layouts need False.'
)


class GridMethod(Method):
    """A method that stores integer codes with a scale, and mostly a zero point, for each group."""

    per_linear: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric", "fine_zeros")

    bits: int = Field(4, ge=2, le=8, description="Bits of the code that is stored for a weight.")
    group_size: GroupSize = Field(
        None,
        ge=1,
        description="Input channels that share a scale and a zero point; None: all of a row do.",
    )
    symmetric: bool = Field(
        False, description="Whether groups have no zero point, so that codes lie around 0."
    )
    fine_zeros: FineZeros = Field("auto", description=FINE_ZEROS)

    @model_validator(mode="after")
    def _check_zeros(self) -> Self:
        if self.fine_zeros is True and self.symmetric:
            raise ValueError(
                "fine_zeros needs zero points, and symmetric groups have none: set one of both "
                "to false"
            )
        return self

    def weight_bytes(self, rows: int, columns: int) -> int:
        shape, grid = (rows, columns), self.grid_shape
        return tensor_bytes(
            shape, self.bits, self.group_size, self.symmetric, grid.zero_shift, "float16"
        )

    def width_fields(self) -> dict[float, dict[str, Any]]:
        return {bits: {"bits": bits} for bits in range(2, 9)}

    @property
    def grid_shape(self) -> GridShape:
        """The settings of the grids."""
        auto = self.bits == 2 and not self.symmetric
        fine = auto if self.fine_zeros == "auto" else self.fine_zeros
        shift = ZERO_BITS - self.bits if fine else 0
        return GridShape(self.bits, self.group_size, self.symmetric, shift)
