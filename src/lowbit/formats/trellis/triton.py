"""Multiplies by trellis codes with Triton's kernels, which decode them as they are stored."""

from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.formats.rotated_triton import RotatedTriton
from lowbit.formats.tiles import by_rows
from lowbit.formats.trellis.codebook import MULTIPLIERS, POSITIONS, TILE
from lowbit.formats.triton import few_tokens

if TYPE_CHECKING:
    from lowbit.formats.trellis import TrellisLinear
    from lowbit.kernels.triton.trellis import Trellis


class Triton(RotatedTriton["TrellisLinear"]):
    """Nothing is packed anew."""

    def repack(self, layer: "TrellisLinear") -> dict[str, Tensor]:
        return {"scale": layer.row_scales().contiguous()}

    def multiply(
        self, layer: "TrellisLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        from lowbit.kernels.triton import trellis
        from lowbit.kernels.triton.launch import total

        weight = _trellis(layer, layer.packed, packed["scale"])
        if few_tokens(len(prepared)):
            return self.finish(layer, total(trellis.few(prepared, weight)))
        return self.finish(layer, _by_strips(layer, packed["scale"], prepared))


def _trellis(layer: "TrellisLinear", packed: Tensor, scale: Tensor) -> "Trellis":
    from lowbit.kernels.triton.trellis import Trellis

    code = layer.code
    return Trellis(
        packed, scale, layer.in_features, code.state_bits, code.shift, code.values, MULTIPLIERS
    )


def _by_strips(layer: "TrellisLinear", scale: Tensor, x: Tensor) -> Tensor:
    """Multiplies by weights of a few strips at a time. x: (tokens, in) -> (tokens, out)"""
    from torch.nn import functional

    from lowbit.kernels.triton import trellis

    strips, across, _ = layer.packed.shape
    scales = functional.pad(scale, (0, TILE * strips - layer.out_features)).view(strips, TILE)

    def product(weight: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        rows = weight.view(TILE * len(packed), TILE * across)[:, : layer.in_features]
        trellis.write(rows, _trellis(layer, packed, scales.flatten()))
        return functional.linear(x, rows)

    y = by_rows(x, (strips, across * POSITIONS), product, [layer.packed, scales], x.dtype)
    return y[:, : layer.out_features]
