"""Multiplies lattice codes with the compiled kernels: those of the codebook HI."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.formats.native import NativeBackend, rounding
from lowbit.kernels.native import Part

if TYPE_CHECKING:
    from lowbit.formats.lattice import LatticeLinear

MIDDLE = 15  # twice the word of code 0, negated: a word of HI is code - 7.5


class Cpu(NativeBackend["LatticeLinear"]):
    """Codes of HI are numbers of 4 bits; the transforms are those of the reference."""

    def supports(
        self,
        layer: "LatticeLinear",
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        gradients: bool,
    ) -> bool:
        return layer.codebook.name == "HI" and super().supports(
            layer, device, dtype, tokens, gradients
        )

    def parts(self, layer: "LatticeLinear") -> list[Part]:
        part = Part(
            first=0,
            inputs=layer.in_features,
            group_size=layer.in_features,
            codes=[layer.packed],
            stream_bits=4,
            bits=4,
            scale=layer.scale.expand(layer.out_features).unsqueeze(1),
            zero=MIDDLE,
            shift=1,
            unit=0.5,
            rounding=rounding(layer),
        )
        return [part]

    def multiply(
        self, layer: "LatticeLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        y = super().multiply(layer, packed, prepared)
        return layer.rotation_out.undo(y, layer.sign_out, layer.factor_out)
