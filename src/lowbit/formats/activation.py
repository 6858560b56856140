"""How a layer rounds its input in a forward, and an attention what it reads; for config.json."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field
from torch import Tensor

from lowbit.config import Config
from lowbit.kernels.tokens import round_tokens


class Activation(Config):
    """Rounds each token on a grid of its own, as `round_tokens` does.

    bits: width of the rounded values, 3 to 8.
    symmetric: whether the grid is symmetric.
    """

    model_config = ConfigDict(strict=True)

    bits: Annotated[int, Field(ge=3, le=8)]
    symmetric: bool

    def round(self, x: Tensor) -> Tensor:
        """Rounds x: (..., channels); returns the same shape and dtype."""
        return round_tokens(x, self.bits, self.symmetric)


class HeadRotation(Config):
    """Rotates the heads of an attention before they are rounded; see `lowbit.kernels.heads`.

    seed: of the signs.
    values: whether values are rotated too, and what attention makes of them is rotated back; False:
        the weights that make and read the values are rotated.
    """

    model_config = ConfigDict(strict=True)

    seed: Annotated[int, Field(ge=0, lt=2**53)]
    values: bool


class AttentionRounding(Activation):
    """Rounds each token and head of the queries, keys and values of an attention, in a forward.

    rotation: how heads are rotated first; None: they are not.
    """

    rotation: HeadRotation | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the settings as JSON values, as `lowbit.blocks.attention` takes them."""
        return self.model_dump(exclude_defaults=True)
