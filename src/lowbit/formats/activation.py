"""How a layer rounds its input in a forward: a part of its entry in config.json."""

from typing import Annotated

from pydantic import ConfigDict, Field
from torch import Tensor

from lowbit.config import Config
from lowbit.kernels.tokens import round_tokens


class Activation(Config):
    """Rounds each token on a grid of its own, as `round_tokens` does.

    An attention rounds each token and head of its queries, keys and values in this way.

    bits: width of the rounded values, 3 to 8.
    symmetric: whether the grid is symmetric.
    """

    model_config = ConfigDict(strict=True)

    bits: Annotated[int, Field(ge=3, le=8)]
    symmetric: bool

    def round(self, x: Tensor) -> Tensor:
        """Rounds x: (..., channels); returns the same shape and dtype."""
        return round_tokens(x, self.bits, self.symmetric)
