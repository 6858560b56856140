"""Trellis codes (QTIP, Tseng et al., arXiv 2406.11235): rounds 256 rotated weights at a time.

`lowbit.methods.rotated` describes the rotation, the feedback and the training. Here tiles of 16 x
16 rotated weights are rounded together, by a Viterbi search for the best of all bit strings
(section 3). Feedback goes from 16 columns to the next 16.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from lowbit.formats.incoherence import Rotation
from lowbit.formats.trellis import TrellisLayout, TrellisLinear, tensor_bytes
from lowbit.formats.trellis.codebook import RATES, TILE, UNIT, TrellisCode, checked_rate
from lowbit.methods.rotated import Code, Rotated
from lowbit.solvers.viterbi import encode

RATIOS = (0.88, 0.93, 0.98)


class Trellis(Rotated):
    """Rotates weights, then rounds 256 at a time to a trellis code.

    Source: QTIP (Tseng et al., arXiv 2406.11235). The rotation, random signs and a Hadamard
    transform on both sides, makes weights look Gaussian. A trellis code rounds them with nearly the
    least error that any code of so many bits can have, at 1, 1.5, 2, 2.5, 3 or 4 bits.
    """

    name: ClassVar[str] = "trellis"
    per_linear: ClassVar[tuple[str, ...]] = ("rate", "state_bits", "scale", "row_scale")
    # With 9 instead of 12 state bits the error is larger by about as much at every rate.
    rough: ClassVar[Mapping[str, Any]] = {**Rotated.rough, "state_bits": 9}

    rate: float = Field(2.0, description="Bits per weight: 1, 1.5, 2, 2.5, 3 or 4.")
    state_bits: int = Field(
        12,
        ge=9,
        le=16,
        description="Bits that a weight depends on; with 16 instead of 12 the error is 2 to 9 % "
        "lower (4 % at 2 bits), and rounding takes 25 times as long.",
    )

    @field_validator("rate")
    @classmethod
    def _check_rate(cls, rate: float) -> float:
        return checked_rate(rate)

    def codes(self) -> dict[float, dict[str, Any]]:
        return {rate: {"rate": rate} for rate in RATES}

    def stored_bytes(self, shape: tuple[int, int], scale: str, dtype: str, signs: str) -> int:
        return tensor_bytes(shape, self.rate, scale, dtype, signs, None)

    def code(self) -> Code:
        code = TrellisCode(self.rate, self.state_bits)

        def nearest(target: Tensor) -> tuple[Tensor, Tensor]:
            return _nearest(target, code)

        def layer(
            codes: Tensor,
            scale: Tensor,
            inner: Rotation,
            outer: Rotation,
            shares: str | None,
            bias: Tensor | None,
        ) -> TrellisLinear:
            layout = TrellisLayout(code, inner, outer, shares)
            return TrellisLinear.from_codes(codes, scale, layout, bias=bias)

        return Code(nearest, TILE, TILE, code.scale, RATIOS, 0, layer)


def _nearest(target: Tensor, code: TrellisCode) -> tuple[Tensor, Tensor]:
    """Rounds a column of tiles. target: (rows, up to 16), in strips of 16 rows.

    Returns the codes (strips, bytes) uint8, and their values (rows, 16) float32.
    """
    filled = functional.pad(target, (0, TILE - target.shape[1]), value=torch.nan)
    by_position = filled.view(-1, TILE, TILE).transpose(1, 2).flatten(1)
    codes = encode(by_position / UNIT, code.table(target.device), code.shift)
    values = code.decode(codes).transpose(1, 2).flatten(0, 1)
    return codes, values.float() * UNIT
