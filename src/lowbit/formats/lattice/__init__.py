"""The lattice format: codes of 8, 4 or 1 weights each, which a codebook maps to words, rotated.

    weight = S_out B_out (scale * words) B_in.T S_in        bits per weight: 2, 3 or 4

S are diagonal matrices of signs and B orthogonal transforms (`incoherence.py`, `kernels/hadamard`);
usually neither is stored. A word is a vector of `dim` weights. A row has `blocks` = ceil(in / dim)
words; the weights of the last word beyond `in` are ignored. The tensors are stored row-major:

| name         | dtype              | shape          | holds                                    |
| ------------ | ------------------ | -------------- | ---------------------------------------- |
| `packed`     | uint8              | (out, bytes)   | a row's codes, along inputs              |
| `scale`      | as `scale_dtype`   | (1,) or (out,) | one for all rows, or one for each        |
| `sign_in`    | as `signs`         | (in,)          | diagonal of S_in; see below when absent  |
| `sign_out`   | as `signs`         | (out,)         | diagonal of S_out; see below when absent |
| `factor_in`  | as `transform_in`  | (K, K)         | M of B_in; see below when absent         |
| `factor_out` | as `transform_out` | (K, K)         | M of B_out; see below when absent        |
| `bias`       | as `bias`          | (out,)         | absent where `bias` is null              |

bytes = ceil(blocks * bits of a code / 8). `codebooks.py` and `e8p.py` describe the bits of a code
and the word that it means. Numbers are little-endian. The entry in config.json:

    {"format": "lattice", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "codebook": "E8P12" | "E8P12RVQ3B" | "E8P12RVQ4B" | "D4" | "HI", "residual_scale": x | null,
     "scale": "tensor" | "row", "scale_dtype": "float16" | "float32", (for a tensor: float32)
     "seed_in": n | null, "seed_out": n | null, "transform_in": KIND, "transform_out": KIND,
     "signs": "seed" | "float16" | "float32", "shares": NAME | null}

KIND is "hadamard", "hartley" or "random". In layers that another program made, it can also be the
dtype "float16" or "float32" of a stored matrix M. Then B = (M (x) I_p)(I_K (x) H_p), where K is the
odd part of the width, above 1, p = width / K, and H_p the Sylvester matrix over sqrt(p).

With signs "seed", the two vectors of signs are not stored. They are drawn from `seed_in` and
`seed_out` as `incoherence.py` describes. A seed of null then means that there are no signs, because
they are part of the model's other tensors. With another value of `signs`, the signs were trained
and are stored in that dtype; the seeds are then used for random transforms only, where null means
0. `shares` names another layer of this format that reads the same input through the same S_in and
B_in; `sign_in` and `factor_in` are then stored in that layer only. `residual_scale` is from -1 to 1
and not 0; it is null if the codebook has one stage. An entry may also have the key `dtype`, which
`formats/entry.py` describes.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.checks import check_shape, dtype_name, finite, storable
from lowbit.formats.entry import LayerEntry, ScaleName
from lowbit.formats.lattice import reference
from lowbit.formats.lattice.codebooks import CODEBOOKS, Codebook, codebook
from lowbit.formats.lattice.cpu import Cpu
from lowbit.formats.lattice.incoherence import Rotation, Stored, restore_weight, rotation
from lowbit.formats.tiles import product_dtype
from lowbit.kernels.hadamard import Kind

Seed = Annotated[int, Field(ge=0, lt=2**53)]  # every JSON reader represents these integers exactly


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


class LatticeEntry(LayerEntry):
    """The entry of a layer in config.json; the module's docstring explains it."""

    format: Literal["lattice"]
    codebook: str
    residual_scale: Annotated[float, Field(ge=-1, le=1)] | None
    scale: Literal["tensor", "row"]
    scale_dtype: ScaleName
    seed_in: Seed | None
    seed_out: Seed | None
    transform_in: Kind | Stored
    transform_out: Kind | Stored
    signs: Literal["seed", "float16", "float32"]
    shares: Annotated[str, Field(min_length=1)] | None

    @property
    def book(self) -> Codebook:
        return codebook(self.codebook, self.residual_scale)

    @property
    def rotation_in(self) -> Rotation:
        return rotation(self.shape[1], self.seed_in, self.transform_in)

    @property
    def rotation_out(self) -> Rotation:
        return rotation(self.shape[0], self.seed_out, self.transform_out)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.book.residual_scale is None) != (self.residual_scale is None):
            raise ValueError(f"residual_scale is missing: {self.codebook} has two stages")
        if self.residual_scale == 0:
            raise ValueError("residual_scale is 0: allowed are -1 to 1, except 0")
        if self.scale == "tensor" and self.scale_dtype != "float32":
            raise ValueError(
                f"scale_dtype is {self.scale_dtype}: allowed for one scale of the whole tensor is "
                "float32"
            )
        for side in ("in", "out"):
            try:
                getattr(self, f"rotation_{side}")
            except ValueError as error:
                raise ValueError(f"transform_{side}: {error}") from None
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

    out * ceil(ceil(in / dim) * bits of a code / 8) + (1 or out) * (2 or 4)

    These are the codes and the scales. Stored signs add (in + out) * (2 or 4), and each stored
    factor adds K**2 * (2 or 4); those of the input side do not count if another layer stores them.

    free: the other fields of the entry, which take no bytes.
    """
    rows, columns = shape
    scales = (rows if scale == "row" else 1) * getattr(torch, scale_dtype).itemsize
    stored = 0 if signs == "seed" else rows + (columns if shares is None else 0)
    sign_bytes = stored * getattr(torch, signs).itemsize if stored else 0
    sides = [(rows, transform_out)] + ([(columns, transform_in)] if shares is None else [])
    factor_bytes = sum(
        (width // (width & -width)) ** 2 * getattr(torch, kind).itemsize
        for width, kind in sides
        if kind in get_args(Stored)
    )
    return rows * CODEBOOKS[codebook].row_bytes(columns) + scales + sign_bytes + factor_bytes


class LatticeLinear(QuantizedLinear):
    """A linear layer in the lattice format; the module's docstring gives its byte layout."""

    format = "lattice"
    Entry = LatticeEntry
    backends = (Cpu(), reference.Reference())

    spec: LatticeEntry
    packed: Tensor
    scale: Tensor
    sign_in: Tensor | None
    sign_out: Tensor | None
    factor_in: Tensor | None
    factor_out: Tensor | None

    def __init__(self, spec: LatticeEntry) -> None:
        super().__init__(spec)
        rows, columns = spec.shape
        self.codebook = spec.book
        self.rotation_in, self.rotation_out = spec.rotation_in, spec.rotation_out
        self.add_frozen("packed", (rows, self.codebook.row_bytes(columns)), "uint8")
        self.add_frozen("scale", (rows if spec.scale == "row" else 1,), spec.scale_dtype)
        signs, owns = None if spec.signs == "seed" else spec.signs, spec.shares is None
        self.add_frozen("sign_out", (rows,), signs)
        self.add_frozen("sign_in", (columns,), signs if owns else None)
        sides = {"factor_out": self.rotation_out, "factor_in": self.rotation_in}
        for name, side in sides.items():
            stored = side.stored if owns or name == "factor_out" else None
            self.add_frozen(name, (side.order, side.order), stored)

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
        stored = {"packed": book.pack(codes), "scale": scale, "bias": bias}
        if signs is not None:
            sides = dict(zip(("sign_in", "sign_out"), signs, strict=True))
            stored |= {name: s if s is None else finite(name, s) for name, s in sides.items()}
        return cls.from_tensors(
            (outer.size, inner.size),
            stored,
            dtype,
            codebook=book.name,
            residual_scale=book.residual_scale,
            scale="tensor" if len(scale) == 1 else "row",
            scale_dtype=dtype_name(scale.dtype),
            seed_in=inner.seed,
            seed_out=outer.seed,
            transform_in=inner.kind,
            transform_out=outer.kind,
            signs="seed" if signs is None else dtype_name(signs[1].dtype),
            shares=layout.shares,
        )

    def with_signs(self, dtype: torch.dtype) -> "LatticeLinear":
        """Returns the same layer with stored signs; it draws them from the seeds if necessary.

        The new layer is not linked to an owner.

        dtype: dtype of the signs, float16 or float32.
        """
        inner, outer = self.sign_in, self.sign_out
        if outer is None:
            inner, outer = (side.signs() for side in (self.rotation_in, self.rotation_out))
        scale = stored_scale(self.scale)
        entry = self.entry() | {"signs": dtype_name(dtype), "scale_dtype": dtype_name(scale.dtype)}
        with self.packed.device:
            made = self.from_entry(entry)
        kept = {"sign_in": None if self.shares else inner, "sign_out": outer}
        made.store(self.state_dict() | {"scale": scale} | kept)
        return made

    @property
    def shares(self) -> str | None:
        return self.spec.shares

    @property
    def owner(self) -> QuantizedLinear:
        """The linked owner; else the layer itself, if it can compute all that the owner holds."""
        if self._owner:
            return self._owner[0]
        if self.shares is None or (self.spec.signs == "seed" and self.rotation_in.stored is None):
            return self
        return super().owner

    def link(self, owner: QuantizedLinear) -> None:
        super().link(owner)
        assert isinstance(owner, LatticeLinear)
        for key in ("signs", "seed_in", "transform_in"):
            here, there = getattr(self.spec, key), getattr(owner.spec, key)
            if here != there:
                self._owner = ()
                raise ValueError(
                    f"{key} is {here}, but {there} in {self.shares}, with which it shares tensors"
                )

    def codes(self) -> Tensor:
        """Returns the codes: (out, blocks) of the codebook's code_dtype."""
        return self.codebook.unpack(self.packed, self.codebook.blocks(self.in_features))

    def rotated(self) -> Tensor:
        """Returns the weight before the transforms, scale * words: (out, in) float32."""
        words = self.codebook.decode(self.codes()).flatten(1)[:, : self.in_features]
        return words * self.scale.float().unsqueeze(1)

    def dequantize(self) -> Tensor:
        owner = self.owner
        assert isinstance(owner, LatticeLinear)
        weight = restore_weight(
            self.rotated(),
            self.rotation_in,
            self.rotation_out,
            (owner.sign_in, self.sign_out),
            (owner.factor_in, self.factor_out),
        )
        return weight.contiguous()

    def prepare(self, x: Tensor) -> Tensor:
        """Computes B_in.T S_in x for each token.

        x: (..., in).

        Returns (..., in): in float64 if x is, else in float32 on a CPU, else in the dtype of x.
        """
        values = x if x.dtype == torch.float64 else x.float()
        rotated = self.rotation_in.apply(values, self.sign_in, self.factor_in)
        return rotated.to(product_dtype(x))

    def shared_tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.sign_in, self.factor_in) if tensor is not None]


def stored_scale(scale: Tensor) -> Tensor:
    """Returns scales in the dtype in which they are stored.

    One scale is stored in float32; one scale for each row in float16, or in float32 if float16
    would lose range. Raises ValueError if the scale is not (1,) or (out,).
    """
    if scale.dim() != 1:
        raise ValueError(f"scale is {tuple(scale.shape)}: allowed are (1,) and (out,)")
    return finite("scale", scale) if len(scale) == 1 else storable(scale)
