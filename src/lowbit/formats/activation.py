"""How a layer rounds what it reads, when it runs: part of an entry in config.json."""

from typing import Annotated

from pydantic import ConfigDict, Field
from torch import Tensor

from lowbit.config import Config
from lowbit.kernels.tokens import round_tokens


class Activation(Config):
    """{"bits": 3..8, "symmetric": bool}: each token on its own grid; see `round_tokens`.

    An attention rounds so each token and head of its queries, keys and values.
    """

    model_config = ConfigDict(strict=True)

    bits: Annotated[int, Field(ge=3, le=8)]
    symmetric: bool

    def round(self, x: Tensor) -> Tensor:
        """x: (..., channels) -> the same shape and dtype."""
        return round_tokens(x, self.bits, self.symmetric)
