"""Words of a codebook for eight, four or one weights at a time, in a rotated basis.

    weight = S_out B_out (scale * words) B_in.T S_in        bits per weight: 2, 3 or 4

S are diagonal matrices of signs and B orthogonal transforms (`incoherence.py`, `kernels/hadamard`);
as a rule neither is stored. A row has `blocks` = ceil(in / dim) words of `dim` weights; the weights
of the last word that lie beyond `in` are left out. The tensors, row-major:

| name         | dtype              | shape          | holds                                    |
| ------------ | ------------------ | -------------- | ---------------------------------------- |
| `packed`     | uint8              | (out, bytes)   | a row's codes, along inputs              |
| `scale`      | as `scale_dtype`   | (1,) or (out,) | one for all rows, or one for each        |
| `sign_in`    | as `signs`         | (in,)          | diagonal of S_in; see below when absent  |
| `sign_out`   | as `signs`         | (out,)         | diagonal of S_out; see below when absent |
| `factor_in`  | as `transform_in`  | (K, K)         | M of B_in; see below when absent         |
| `factor_out` | as `transform_out` | (K, K)         | M of B_out; see below when absent        |
| `bias`       | as `bias`          | (out,)         | absent where `bias` is null              |

bytes = ceil(blocks * bits of a code / 8). What stands in a code and what it means is said in
`codebooks.py` and `e8p.py`. Numbers are little-endian. The entry in config.json:

    {"format": "lattice", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "codebook": "E8P12" | "E8P12RVQ3B" | "E8P12RVQ4B" | "D4" | "HI", "residual_scale": x | null,
     "scale": "tensor" | "row", "scale_dtype": "float16" | "float32", (for a tensor: float32)
     "seed_in": n | null, "seed_out": n | null, "transform_in": KIND, "transform_out": KIND,
     "signs": "seed" | "float16" | "float32", "shares": NAME | null}

KIND is "hadamard", "hartley" or "random"; or, in layers that another program made, the dtype
"float16" or "float32" of a stored matrix M. Then B = (M (x) I_p)(I_K (x) H_p), where K is the odd
part of the width, above 1, p the rest and H_p the Sylvester matrix over sqrt(p).

With signs "seed" the two vectors of signs are not stored. They are drawn from `seed_in` and
`seed_out` as `incoherence.py` says; a seed of null means that there are no signs, because they are
part of the model's other tensors. Otherwise the signs were trained and are stored in that dtype;
the seeds are then used for random transforms only, for which null is 0. `shares` names another
layer of this format that reads the same input through the same S_in and B_in; `sign_in` and
`factor_in` are then stored in that layer alone. `residual_scale` is from -1 to 1 and not 0, and
null where the codebook has one stage. An entry may also have the `dtype` of `formats/entry.py`.
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
from lowbit.formats.lattice.incoherence import Rotation, Stored, restore_weight, rotation
from lowbit.formats.tiles import product_dtype
from lowbit.kernels.hadamard import Kind

Seed = Annotated[int, Field(ge=0, lt=2**53)]  # what every reader of JSON holds exactly


@dataclass(frozen=True)
class LatticeLayout:
    """How a layer is stored.

    codebook: of its words.
    rotation_in, rotation_out: of its two sides.
    shares: the name of the layer that has the input side, where `lowbit.formats.link` must find it;
        None: this one has it.
    """

    codebook: Codebook
    rotation_in: Rotation
    rotation_out: Rotation
    shares: str | None = None


class LatticeEntry(LayerEntry):
    """The entry of a layer; the module's docstring explains it."""

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
            raise ValueError("residual_scale is 0: allowed is -1 to 1 without 0")
        if self.scale == "tensor" and self.scale_dtype != "float32":
            raise ValueError(f"scale_dtype is {self.scale_dtype}: a tensor's scale is float32")
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
    """Bytes that stand for the weight, those of `LatticeLinear.weight_bytes()`:

    out * ceil(ceil(in / dim) * bits of a code / 8) + (1 or out) * (2 or 4)

    that is codes and scales; (in + out) * (2 or 4) for signs that are stored; and K**2 * (2 or 4)
    for each factor that is stored; without those of `in` where another layer has them. free: what
    else an entry holds takes no bytes.
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
    """A linear layer of words from a codebook; the module's docstring gives its bytes."""

    format = "lattice"
    Entry = LatticeEntry
    backends = (reference.Reference(),)

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
        """The nearest words to a rotated weight, counted from the scale as it is stored.

        rotated: (out, in), what `incoherence.rotate_weight` gives; the others as `from_codes` takes
        them. Rounds block by block without feedback.
        """
        book, columns = layout.codebook, layout.rotation_in.size
        check_shape("rotated", rotated, torch.Size((layout.rotation_out.size, columns)))
        step = stored_scale(scale).float().to(rotated.device).unsqueeze(-1)
        # A division by infinity is the 0 that a row without a scale should get, and never NaN.
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
        """A layer of these codes.

        codes: (out, blocks) of the codebook's code_dtype  scale: (1,) or (out,)
        signs: (in,) and (out,), both float16 or both float32, where they were trained; the first
            one is None in a layer that shares.
        bias: (out,), kept in its dtype.
        dtype: of the float weight that the layer stands for; None: not known.
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
        """The same layer with its signs stored, as they are or as the seeds draw them; not linked.

        dtype: float16 or float32.
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
        """Itself where it is not linked but could make all that the owner holds."""
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
                    f"{key} is {here}, but {there} in {self.shares}, with which it shares"
                )

    def codes(self) -> Tensor:
        """(out, blocks) of the codebook's code_dtype"""
        return self.codebook.unpack(self.packed, self.codebook.blocks(self.in_features))

    def rotated(self) -> Tensor:
        """The weight before the transforms, scale * words: (out, in) float32"""
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
        """B_in.T S_in x for each token.

        x: (..., in)  ->  (..., in) in float32 on a CPU, float64 if x is; elsewhere in its dtype
        """
        values = x if x.dtype == torch.float64 else x.float()
        rotated = self.rotation_in.apply(values, self.sign_in, self.factor_in)
        return rotated.to(product_dtype(x))

    def shared_tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.sign_in, self.factor_in) if tensor is not None]


def stored_scale(scale: Tensor) -> Tensor:
    """One scale in float32, or one for each row in float16 where that loses no range."""
    if scale.dim() != 1:
        raise ValueError(f"scale is {tuple(scale.shape)}: allowed are (1,) and (out,)")
    return finite("scale", scale) if len(scale) == 1 else storable(scale)
