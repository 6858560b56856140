"""The trellis format: tiles of 16 x 16 weights, each a ring of bits of which every window is read.

    weight = S_out B_out (scale * values / 32) B_in.T S_in

The tensors and the keys of `formats/rotated.py`, and:

| name     | dtype | shape                        | holds             |
| -------- | ----- | ---------------------------- | ----------------- |
| `packed` | uint8 | (out tiles, in tiles, bytes) | the bits of tiles |

out tiles = ceil(out / 16), in tiles = ceil(in / 16), bytes = 32 * rate. Weights of the last tiles
beyond `out` and `in` are ignored. A tile has 256 * rate bits; bit i is bit i % 8 of byte i // 8. It
is decoded in steps of `shift` bits, each of which gives `values` weights:

| rate   | 1 | 1.5 | 2 | 2.5 | 3 | 4 |
| ------ | - | --- | - | --- | - | - |
| shift  | 1 | 3   | 2 | 5   | 3 | 4 |
| values | 1 | 2   | 1 | 2   | 1 | 1 |

The state of step t is the number in the `state_bits` bits from bit t * shift on, low bits first;
after the tile's last bit follows its first. The state means one or two values, whole numbers that
`codebook.py` computes. With steps = 256 / values, value v of step t belongs to position
t + v * steps of the tile, and position p to its row p % 16 and its column p // 16. The entry in
config.json:

    {"format": "trellis", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "codebook": "sum6", "rate": 1 | 1.5 | 2 | 2.5 | 3 | 4, "state_bits": 9 to 16,
     and the keys of `formats/rotated.py`}

An entry may also have the key `dtype`, which `formats/entry.py` describes. Source of the code: QTIP
(Tseng et al., arXiv 2406.11235), section 3.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from lowbit.formats.incoherence import Rotation
from lowbit.formats.rotated import (
    RotatedEntry,
    RotatedLinear,
    side_bytes,
    side_facts,
    sign_tensors,
    stored_scale,
)
from lowbit.formats.trellis import reference
from lowbit.formats.trellis.codebook import TILE, UNIT, TrellisCode, checked_rate, tile_bytes, tiles
from lowbit.formats.trellis.cpu import Cpu
from lowbit.formats.trellis.triton import Triton


@dataclass(frozen=True)
class TrellisLayout:
    """How a layer is stored.

    code: what the bits of its tiles mean.
    rotation_in, rotation_out: signs and transform of the inputs and of the outputs.
    shares: name of the layer that stores the tensors of the input side, as `lowbit.formats.link`
        will look it up; None: this layer stores them.
    """

    code: TrellisCode
    rotation_in: Rotation
    rotation_out: Rotation
    shares: str | None = None


class TrellisEntry(RotatedEntry):
    """The entry of a layer in config.json; the module's docstring explains it."""

    format: Literal["trellis"]
    codebook: Literal["sum6"]
    rate: float
    state_bits: Annotated[int, Field(ge=9, le=16)]

    @field_validator("rate")
    @classmethod
    def _check_rate(cls, rate: float) -> float:
        return checked_rate(rate)

    @property
    def code(self) -> TrellisCode:
        return TrellisCode(self.rate, self.state_bits)


def tensor_bytes(
    shape: list[int] | tuple[int, int],
    rate: float,
    scale: str,
    scale_dtype: str,
    signs: str,
    shares: str | None,
    transform_in: str = "hadamard",
    transform_out: str = "hadamard",
    **free: Any,
) -> int:
    """Returns `TrellisLinear.weight_bytes()` of the layer that an entry describes:

    ceil(out / 16) * ceil(in / 16) * 32 * rate + `rotated.side_bytes`

    free: the other fields of the entry, which take no bytes.
    """
    rows, columns = shape
    sides = side_bytes(shape, scale, scale_dtype, signs, shares, transform_in, transform_out)
    return tiles(rows) * tiles(columns) * tile_bytes(rate) + sides


class TrellisLinear(RotatedLinear):
    """A linear layer in the trellis format; the module's docstring gives its byte layout."""

    format = "trellis"
    Entry = TrellisEntry
    backends = (Cpu(), Triton(), reference.Reference())

    spec: TrellisEntry
    packed: Tensor

    def add_codes(self) -> None:
        self.code = self.spec.code
        rows, columns = self.spec.shape
        shape = tiles(rows), tiles(columns), tile_bytes(self.spec.rate)
        self.add_frozen("packed", shape, "uint8")

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        layout: TrellisLayout,
        *,
        signs: tuple[Tensor | None, Tensor] | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Returns a layer with these codes.

        codes: (out tiles, in tiles, bytes) uint8.
        scale: (1,) or (out,).
        signs: trained signs (in,) and (out,), both float16 or both float32; the first is None in a
            layer that shares. None: the signs are drawn from the seeds.
        bias: (out,), kept in its dtype.
        dtype: dtype of the original float weight; None: unknown.
        """
        code, inner, outer = layout.code, layout.rotation_in, layout.rotation_out
        scale = stored_scale(scale)
        return cls.from_tensors(
            (outer.size, inner.size),
            {"packed": codes, "scale": scale, "bias": bias, **sign_tensors(signs)},
            dtype,
            codebook="sum6",
            rate=code.rate,
            state_bits=code.state_bits,
            **side_facts((inner, outer), layout.shares, scale, signs),
        )

    def row_scales(self) -> Tensor:
        """Returns the scale of each row of values: (out,) float32."""
        return (self.scale.float() * UNIT).expand(self.out_features)

    def rotated(self) -> Tensor:
        """Returns the weight before the transforms: (out, in) float32."""
        rows, columns = self.spec.shape
        grid = self.code.decode(self.packed)  # (out tiles, in tiles, column, row)
        values = grid.permute(0, 3, 1, 2).reshape(TILE * len(grid), -1)[:rows, :columns]
        return values.float() * self.row_scales().unsqueeze(1)
