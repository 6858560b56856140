"""The reference of the trellis format: its arithmetic in plain torch."""

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend
from lowbit.formats.tiles import by_rows
from lowbit.formats.trellis.codebook import POSITIONS, TILE

if TYPE_CHECKING:
    from lowbit.formats.trellis import TrellisLinear


class Reference(Backend["TrellisLinear"]):
    """Multiplies the rotated input by the values of a few rows of tiles at a time, and rotates."""

    name = "reference"

    def multiply(
        self, layer: "TrellisLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        strips, across, _ = layer.packed.shape
        padding = TILE * strips - layer.out_features
        scales = functional.pad(layer.row_scales(), (0, padding)).view(strips, 1, TILE)

        def product(weight: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
            # (strip, input, row in the strip), which is how tiles are stored
            values = weight.view(len(packed), TILE * across, TILE)
            values.copy_(layer.code.decode(packed).flatten(1, 2))
            values = values.mul_(scales)[:, : layer.in_features].transpose(1, 2)
            return functional.linear(prepared, values.flatten(0, 1).to(prepared.dtype))

        y = by_rows(prepared, (strips, across * POSITIONS), product, (layer.packed, scales))
        return layer.finish(y[:, : layer.out_features])
