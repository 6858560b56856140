"""What the formats `lattice` and `trellis` share: weights that are rotated before rounding.

    weight = S_out B_out rotated B_in.T S_in

S are diagonal matrices of signs and B orthogonal transforms (`incoherence.py`, `kernels/hadamard`);
usually neither is stored. A format says how `rotated` is stored. Its tensors beside that, row-major
and little-endian:

| name         | dtype              | shape          | holds                                    |
| ------------ | ------------------ | -------------- | ---------------------------------------- |
| `scale`      | as `scale_dtype`   | (1,) or (out,) | one for all rows, or one for each        |
| `sign_in`    | as `signs`         | (in,)          | diagonal of S_in; see below when absent  |
| `sign_out`   | as `signs`         | (out,)         | diagonal of S_out; see below when absent |
| `factor_in`  | as `transform_in`  | (K, K)         | M of B_in; see below when absent         |
| `factor_out` | as `transform_out` | (K, K)         | M of B_out; see below when absent        |
| `bias`       | as `bias`          | (out,)         | absent where `bias` is null              |

The keys of the entry in config.json:

    "scale": "tensor" | "row", "scale_dtype": "float16" | "float32", (for a tensor: float32)
    "seed_in": n | null, "seed_out": n | null, "transform_in": KIND, "transform_out": KIND,
    "signs": "seed" | "float16" | "float32", "shares": NAME | null

KIND is "hadamard", "hartley" or "random". In layers that another program made, it can also be the
dtype "float16" or "float32" of a stored matrix M. Then B = (M (x) I_p)(I_K (x) H_p), where K is the
odd part of the width, above 1, p = width / K, and H_p the Sylvester matrix over sqrt(p).

With signs "seed", the two vectors of signs are not stored. They are drawn from `seed_in` and
`seed_out` as `incoherence.py` describes. A seed of null then means that there are no signs, because
they are part of the model's other tensors. With another value of `signs`, the signs were trained
and are stored in that dtype; the seeds are then used for random transforms only, where null means
0. `shares` names another layer of the same format that reads the same input through the same S_in
and B_in; `sign_in` and `factor_in` are then stored in that layer only.
"""

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.checks import dtype_name, finite, storable
from lowbit.formats.entry import LayerEntry, ScaleName
from lowbit.formats.incoherence import Rotation, Stored, restore_weight, rotation
from lowbit.formats.tiles import product_dtype
from lowbit.kernels.hadamard import Kind

Seed = Annotated[int, Field(ge=0, lt=2**53)]  # every JSON reader represents these integers exactly


class RotatedEntry(LayerEntry):
    """The part of an entry that says how the weight is rotated and scaled."""

    scale: Literal["tensor", "row"]
    scale_dtype: ScaleName
    seed_in: Seed | None
    seed_out: Seed | None
    transform_in: Kind | Stored
    transform_out: Kind | Stored
    signs: Literal["seed", "float16", "float32"]
    shares: Annotated[str, Field(min_length=1)] | None

    @property
    def rotation_in(self) -> Rotation:
        return rotation(self.shape[1], self.seed_in, self.transform_in)

    @property
    def rotation_out(self) -> Rotation:
        return rotation(self.shape[0], self.seed_out, self.transform_out)

    @model_validator(mode="after")
    def _check_sides(self) -> Self:
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


def side_bytes(
    shape: list[int] | tuple[int, int],
    scale: str,
    scale_dtype: str,
    signs: str,
    shares: str | None,
    transform_in: str = "hadamard",
    transform_out: str = "hadamard",
) -> int:
    """Returns the bytes of the tensors in the module's docstring, without the bias:

    (1 or out) * (2 or 4)

    These are the scales. Stored signs add (in + out) * (2 or 4), and each stored factor adds
    K**2 * (2 or 4); those of the input side do not count if another layer stores them.
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
    return scales + sign_bytes + factor_bytes


class RotatedLinear(QuantizedLinear):
    """A linear layer whose stored weight is rotated; the module's docstring gives its tensors."""

    vectors = ("scale", "sign_in", "sign_out")
    shared_fields = ("signs", "seed_in", "transform_in")

    spec: RotatedEntry
    scale: Tensor
    sign_in: Tensor | None
    sign_out: Tensor | None
    factor_in: Tensor | None
    factor_out: Tensor | None

    def __init__(self, spec: RotatedEntry) -> None:
        super().__init__(spec)
        self.rotation_in, self.rotation_out = spec.rotation_in, spec.rotation_out
        self.add_codes()
        rows, columns = spec.shape
        self.add_frozen("scale", (rows if spec.scale == "row" else 1,), spec.scale_dtype)
        signs, owns = None if spec.signs == "seed" else spec.signs, spec.shares is None
        self.add_frozen("sign_out", (rows,), signs)
        self.add_frozen("sign_in", (columns,), signs if owns else None)
        sides = {"factor_out": self.rotation_out, "factor_in": self.rotation_in}
        for name, side in sides.items():
            stored = side.stored if owns or name == "factor_out" else None
            self.add_frozen(name, (side.order, side.order), stored)

    @abstractmethod
    def add_codes(self) -> None:
        """Registers the tensors of the codes."""

    @abstractmethod
    def rotated(self) -> Tensor:
        """Returns the weight before the transforms: (out, in) float32."""

    def with_signs(self, dtype: torch.dtype) -> Self:
        """Returns the same layer with stored signs; it draws them from the seeds if necessary.

        The new layer is not linked to an owner.

        dtype: dtype of the signs, float16 or float32.
        """
        inner, outer = self.sign_in, self.sign_out
        if outer is None:
            inner, outer = (side.signs() for side in (self.rotation_in, self.rotation_out))
        scale = stored_scale(self.scale)
        entry = self.entry() | {"signs": dtype_name(dtype), "scale_dtype": dtype_name(scale.dtype)}
        with self.scale.device:
            made = self.from_entry(entry)
        kept = {"sign_in": None if self.shares else inner, "sign_out": outer}
        made.store(self.state_dict() | {"scale": scale} | kept)
        return made

    def with_vectors(self) -> QuantizedLinear:
        """Returns the layer with its signs as float16; drawn signs become numbers of any size."""
        return self if self.sign_out is not None else self.with_signs(torch.float16)

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

    def dequantize(self) -> Tensor:
        owner = self.owner
        assert isinstance(owner, RotatedLinear)
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

    def finish(self, y: Tensor) -> Tensor:
        """Computes S_out B_out y for each token. y: (tokens, out), the product with `rotated`."""
        y = y if y.dtype == torch.float64 else y.float()
        return self.rotation_out.undo(y, self.sign_out, self.factor_out)

    def shared_tensors(self) -> list[Tensor]:
        stored = self._parameters  # which is read 5 times as fast as attributes
        tensors = stored["sign_in"], stored["factor_in"]
        return [tensor for tensor in tensors if tensor is not None]


def side_facts(
    sides: tuple[Rotation, Rotation],
    shares: str | None,
    scale: Tensor,
    signs: tuple[Tensor | None, Tensor] | None,
) -> dict[str, Any]:
    """Returns the fields of the entry that say how the weight is rotated and scaled.

    sides: signs and transform of the inputs and of the outputs.
    shares: name of the layer that stores the tensors of the input side; None: this one does.
    scale: the result of `stored_scale`.
    signs: trained signs, of which only the dtype matters here; None: those of the seeds.
    """
    inner, outer = sides
    return {
        "scale": "tensor" if len(scale) == 1 else "row",
        "scale_dtype": dtype_name(scale.dtype),
        "seed_in": inner.seed,
        "seed_out": outer.seed,
        "transform_in": inner.kind,
        "transform_out": outer.kind,
        "signs": "seed" if signs is None else dtype_name(signs[1].dtype),
        "shares": shares,
    }


def sign_tensors(signs: tuple[Tensor | None, Tensor] | None) -> dict[str, Tensor | None]:
    """Returns the tensors of trained signs by name; none if the signs are those of the seeds.

    signs: those of the inputs, or None in a layer that shares, and those of the outputs.
    """
    if signs is None:
        return {}
    sides = dict(zip(("sign_in", "sign_out"), signs, strict=True))
    return {name: s if s is None else finite(name, s) for name, s in sides.items()}


def stored_scale(scale: Tensor) -> Tensor:
    """Returns scales in the dtype in which they are stored.

    One scale is stored in float32; one scale for each row in float16, or in float32 if float16
    would lose range. Raises ValueError if the scale is not (1,) or (out,).
    """
    if scale.dim() != 1:
        raise ValueError(f"scale is {tuple(scale.shape)}: allowed are (1,) and (out,)")
    return finite("scale", scale) if len(scale) == 1 else storable(scale)
