"""The lattice format: codes of 8, 4 or 1 weights each, which a codebook maps to words, rotated.

    weight = S_out B_out (scale * words) B_in.T S_in        bits per weight: 2, 3 or 4

A word is a vector of `dim` weights. A row has `blocks` = ceil(in / dim) words; the weights of the
last word beyond `in` are ignored. The tensors and the keys of `formats/rotated.py`, and:

| name     | dtype | shape        | holds                          |
| -------- | ----- | ------------ | ------------------------------ |
| `packed` | uint8 | (out, bytes) | a row's codes, along inputs    |

bytes = ceil(blocks * bits of a code / 8). `codebooks.py` and `e8p.py` describe the bits of a code
and the word that it means. The entry in config.json:

    {"format": "lattice", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "codebook": "E8P12" | "E8P12RVQ3B" | "E8P12RVQ4B" | "D4" | "HI", "residual_scale": x | null,
     and the keys of `formats/rotated.py`}

`residual_scale` is from -1 to 1 and not 0; it is null if the codebook has one stage. An entry may
also have the key `dtype`, which `formats/entry.py` describes.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from lowbit.formats.checks import check_shape, finite
from lowbit.formats.incoherence import Rotation
from lowbit.formats.lattice import reference
from lowbit.formats.lattice.codebooks import CODEBOOKS, Codebook, codebook
from lowbit.formats.lattice.cpu import Cpu
from lowbit.formats.lattice.triton import Triton
from lowbit.formats.rotated import (
    RotatedEntry,
    RotatedLinear,
    side_bytes,
    side_facts,
    sign_tensors,
    stored_scale,
)


@dataclass(frozen=True)
class LatticeLayout:
    """How a layer is stored.

    codebook: the codebook of its codes.
    rotation_in, rotation_out: signs and transform of the inputs and of the outputs.
    shares: name of the layer that stores the tensors of the input side, as `lowbit.formats.link`
        will look it up; None: this layer stores them.
    """

    codebook: Codebook
    rotation_in: Rotation
    rotation_out: Rotation
    shares: str | None = None


class LatticeEntry(RotatedEntry):
    """The entry of a layer in config.json; the module's docstring explains it."""

    format: Literal["lattice"]
    codebook: str
    residual_scale: Annotated[float, Field(ge=-1, le=1)] | None

    @property
    def book(self) -> Codebook:
        return codebook(self.codebook, self.residual_scale)

    @model_validator(mode="after")
    def _check_codebook(self) -> Self:
        if (self.book.residual_scale is None) != (self.residual_scale is None):
            raise ValueError(f"residual_scale is missing: {self.codebook} has two stages")
        if self.residual_scale == 0:
            raise ValueError("residual_scale is 0: allowed are -1 to 1, except 0")
        return self


def tensor_bytes(
    shape: list[int] | tuple[int, int],
    codebook: str,
    scale: str,
    scale_dtype: str,
    signs: str,
    shares: str | None,
    transform_in: str = "hadamard",
    transform_out: str = "hadamard",
    **free: Any,
) -> int:
    """Returns `LatticeLinear.weight_bytes()` of the layer that an entry describes:

    out * ceil(ceil(in / dim) * bits of a code / 8) + `rotated.side_bytes`

    free: the other fields of the entry, which take no bytes.
    """
    sides = side_bytes(shape, scale, scale_dtype, signs, shares, transform_in, transform_out)
    return shape[0] * CODEBOOKS[codebook].row_bytes(shape[1]) + sides


class LatticeLinear(RotatedLinear):
    """A linear layer in the lattice format; the module's docstring gives its byte layout."""

    format = "lattice"
    Entry = LatticeEntry
    backends = (Cpu(), Triton(), reference.Reference())

    spec: LatticeEntry
    packed: Tensor

    def add_codes(self) -> None:
        self.codebook = self.spec.book
        rows, columns = self.spec.shape
        self.add_frozen("packed", (rows, self.codebook.row_bytes(columns)), "uint8")

    @classmethod
    def from_rotated(
        cls,
        rotated: Tensor,
        scale: Tensor,
        layout: LatticeLayout,
        *,
        signs: tuple[Tensor | None, Tensor] | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Rounds a rotated weight to the nearest words, given the scale as it will be stored.

        Each word is rounded independently, without feedback of errors.

        rotated: (out, in), the result of `incoherence.rotate_weight`.
        scale, layout, signs, bias, dtype: as for `from_codes`.
        """
        book, columns = layout.codebook, layout.rotation_in.size
        check_shape("rotated", rotated, torch.Size((layout.rotation_out.size, columns)))
        step = stored_scale(scale).float().to(rotated.device).unsqueeze(-1)
        # A row whose scale is 0 is divided by infinity, because a division by 0 could give NaN.
        x = finite("rotated", rotated) / step.masked_fill(step == 0, torch.inf)
        blocks = book.blocks(columns)
        x = functional.pad(x, (0, blocks * book.dim - columns))
        codes, _ = book.nearest(x.unflatten(-1, (blocks, book.dim)))
        return cls.from_codes(codes, scale, layout, signs=signs, bias=bias, dtype=dtype)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        layout: LatticeLayout,
        *,
        signs: tuple[Tensor | None, Tensor] | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Returns a layer with these codes.

        codes: (out, blocks) of the codebook's code_dtype.
        scale: (1,) or (out,).
        signs: trained signs (in,) and (out,), both float16 or both float32; the first is None in a
            layer that shares. None: the signs are drawn from the seeds.
        bias: (out,), kept in its dtype.
        dtype: dtype of the original float weight; None: unknown.
        """
        book, inner, outer = layout.codebook, layout.rotation_in, layout.rotation_out
        scale = stored_scale(scale)
        return cls.from_tensors(
            (outer.size, inner.size),
            {"packed": book.pack(codes), "scale": scale, "bias": bias, **sign_tensors(signs)},
            dtype,
            codebook=book.name,
            residual_scale=book.residual_scale,
            **side_facts((inner, outer), layout.shares, scale, signs),
        )

    def codes(self) -> Tensor:
        """Returns the codes: (out, blocks) of the codebook's code_dtype."""
        return self.codebook.unpack(self.packed, self.codebook.blocks(self.in_features))

    def rotated(self) -> Tensor:
        """Returns the weight before the transforms, scale * words: (out, in) float32."""
        words = self.codebook.decode(self.codes()).flatten(1)[:, : self.in_features]
        return words * self.scale.float().unsqueeze(1)
