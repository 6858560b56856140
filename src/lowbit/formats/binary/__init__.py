"""The binary format: one bit per weight for most input channels, four bits for salient ones.

    plain channel:    weight = column_scale * (row_mean + row_scale)   where the bit is 0
                      weight = column_scale * (row_mean - row_scale)   where the bit is 1
    salient channel:  weight = salient_scale * (code - zero)

The method is PTQ1.61. A mask has one bit for each input channel. The bit is 1 for the `salient`
channels; the others are plain, and there are plain = in - salient of them. Plain channels stay in
their order, and so do salient ones. The tensors are stored row-major:

| name            | dtype            | shape                    | holds                        |
| --------------- | ---------------- | ------------------------ | ---------------------------- |
| `sign`          | uint8            | (out, ceil(plain / 8))   | a row's bits                 |
| `row_scale`     | as `scale_dtype` | (out,)                   |                              |
| `row_mean`      | as `scale_dtype` | (out,)                   | absent if false below        |
| `column_scale`  | as `scale_dtype` | (plain,)                 | absent if false below        |
| `salient`       | uint8            | (out, ceil(salient / 2)) | a row's codes, 0 to 15       |
| `salient_scale` | as `scale_dtype` | (out,)                   |                              |
| `salient_zero`  | uint8            | (ceil(out / 2),)         | the rows' zeros, 0 to 15     |
| `mask`          | uint8            | (ceil(in / 8),)          | absent if `shares` is a name |
| `bias`          | as `bias`        | (out,)                   | absent if `bias` is null     |

An absent row mean is 0, absent column scales are 1. `salient`, `salient_scale`, `salient_zero` and
`mask` are absent if there are 0 salient channels. Bits and codes are stored as little-endian bit
streams: number j of a row is in the bits [j * width, (j + 1) * width) of that row, low bits first,
where bit i is bit i % 8 of byte i // 8. Each row starts at a byte, and its last byte is filled up
with zero bits; the zeros are one row, and so is the mask. Float numbers are little-endian. They are
float16. All of a layer's are float32 if a scale would lose range in float16 (a non-zero magnitude
below 2**-14 or above 65504) or a mean would be infinite. The entry in config.json:

    {"format": "binary", "shape": [out, in], "bias": "float32" | "float16" | "bfloat16" | null,
     "salient": n, "row_mean": bool, "column_scale": bool, "scale_dtype": "float16" | "float32",
     "shares": NAME | null}

`shares` names another layer of this format that reads the same input and has as many salient
channels; the mask is then stored in that layer only. An entry may also have the key `dtype`, which
`formats/entry.py` describes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.binary import reference
from lowbit.formats.binary.cpu import Cpu
from lowbit.formats.binary.lookup import Lookup
from lowbit.formats.binary.triton import Triton
from lowbit.formats.binary.weight import Weight
from lowbit.formats.checks import check_shape, dtype_name, finite, storable
from lowbit.formats.entry import LayerEntry, ScaleName
from lowbit.kernels.bits import pack, packed_bytes, unpack


class BinaryEntry(LayerEntry):
    """The entry of a layer in config.json; the module's docstring explains it."""

    format: Literal["binary"]
    salient: Annotated[int, Field(ge=0)]
    row_mean: bool
    column_scale: bool
    scale_dtype: ScaleName
    shares: Annotated[str, Field(min_length=1)] | None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.salient >= self.shape[1]:
            raise ValueError(
                f"salient is {self.salient}: allowed with {self.shape[1]} inputs are 0 to "
                f"{self.shape[1] - 1}"
            )
        if self.shares is not None and not self.salient:
            raise ValueError(f"shares is {self.shares!r}: it must be null without salient channels")
        return self


def tensor_bytes(
    shape: list[int] | tuple[int, int],
    salient: int,
    row_mean: bool,
    column_scale: bool,
    scale_dtype: str,
    shares: str | None,
    **free: Any,
) -> int:
    """Returns `BinaryLinear.weight_bytes()` of the layer that an entry describes:

    out * (ceil(plain / 8) + ceil(salient / 2)) + (2 or 4) * scales + ceil(out / 2) + ceil(in / 8)

    These are the bits and codes; the scales (2 for float16): out for the rows, out for the means,
    plain for the columns, out for the salient channels; the zeros of the salient channels; and the
    mask. There are no salient scales, no zeros and no mask without salient channels, and no mask if
    another layer stores it.

    free: the other fields of the entry, which take no bytes.
    """
    rows, columns = shape
    plain = columns - salient
    scales = rows * (1 + row_mean + bool(salient)) + plain * column_scale
    codes = rows * (packed_bytes(plain, 1) + packed_bytes(salient, 4))
    zeros = packed_bytes(rows, 4) if salient else 0
    mask = packed_bytes(columns, 1) if salient and shares is None else 0
    return codes + scales * getattr(torch, scale_dtype).itemsize + zeros + mask


@dataclass(frozen=True)
class Salient:
    """The weights of the salient channels.

    channels: (salient,) int64, ascending.
    codes: (out, salient) uint8, below 16.
    scale: (out,).
    zero: (out,) of an integer dtype, 0 to 15.
    """

    channels: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def nearest(cls, channels: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Self:
        """Rounds a float weight to the nearest codes, given the scale as it will be stored.

        channels: (salient,) int64, ascending.
        weight: (out, salient), the columns of the salient channels only.
        scale: (out,).
        zero: (out,), rounded and clamped to 0 to 15.
        """
        scale = storable(scale)
        zero = finite("salient zero", zero).round().clamp(0, 15).to(torch.uint8)
        codes = reference.round_salient(finite("salient weight", weight), scale, zero)
        return cls(channels, codes, scale, zero)

    def packed(self, rows: int) -> dict[str, Tensor]:
        """Returns `salient` and `salient_zero` as they are stored, for a layer of `rows` rows."""
        check_shape("salient zero", self.zero, torch.Size((rows,)))
        return {
            "salient": pack(self.codes, 4),
            "salient_zero": pack(self.zero.to(torch.uint8), 4),
        }

    def mask(self, columns: int) -> Tensor:
        """Returns `mask` as it is stored: one bit for each of `columns` inputs."""
        mask = torch.zeros(columns, dtype=torch.uint8, device=self.zero.device)
        mask[self.channels] = 1
        if int(mask.sum()) != self.codes.shape[1]:
            raise ValueError(
                f"there are {len(self.channels)} salient channels, {int(mask.sum())} without "
                f"duplicates: allowed is {self.codes.shape[1]}, as many as the codes have"
            )
        return pack(mask, 1)

    def dequantize(self) -> Tensor:
        """Returns the weight of the salient channels: (out, salient) float32."""
        return reference.salient_weight(self.codes, self.scale, self.zero)


class BinaryLinear(QuantizedLinear):
    """A linear layer in the binary format; the module's docstring gives its byte layout."""

    format = "binary"
    limited = ("mask",)
    shared_fields = ("salient",)
    Entry = BinaryEntry
    backends = (Cpu(), Triton(), Lookup(), Weight(), reference.Reference())
    vectors = ("row_scale", "row_mean", "column_scale", "salient_scale")

    spec: BinaryEntry
    sign: Tensor
    row_scale: Tensor
    row_mean: Tensor | None
    column_scale: Tensor | None
    salient: Tensor | None
    salient_scale: Tensor | None
    salient_zero: Tensor | None
    mask: Tensor | None

    def __init__(self, spec: BinaryEntry) -> None:
        super().__init__(spec)
        rows, columns = spec.shape
        self.plain = columns - spec.salient
        scales = spec.scale_dtype
        self.add_frozen("sign", (rows, packed_bytes(self.plain, 1)), "uint8")
        self.add_frozen("row_scale", (rows,), scales)
        self.add_frozen("row_mean", (rows,), scales if spec.row_mean else None)
        self.add_frozen("column_scale", (self.plain,), scales if spec.column_scale else None)
        codes = "uint8" if spec.salient else None
        self.add_frozen("salient", (rows, packed_bytes(spec.salient, 4)), codes)
        self.add_frozen("salient_scale", (rows,), scales if spec.salient else None)
        self.add_frozen("salient_zero", (packed_bytes(rows, 4),), codes)
        mask = codes if spec.shares is None else None
        self.add_frozen("mask", (packed_bytes(columns, 1),), mask)

    @classmethod
    def from_parts(
        cls,
        negative: Tensor,
        row_scale: Tensor,
        *,
        row_mean: Tensor | None = None,
        column_scale: Tensor | None = None,
        salient: Salient | None = None,
        shares: str | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Returns a layer with these signs and scales.

        negative: (out, plain) bool, True where `row_scale` is subtracted.
        row_scale, row_mean: (out,).
        column_scale: (plain,).
        salient: the salient channels; None: all channels are plain.
        shares: name of the layer that stores the mask, as `lowbit.formats.link` will look it up;
            None: this layer stores it.
        bias: (out,), kept in its dtype.
        dtype: dtype of the original float weight; None: unknown.
        """
        scales = {"row_scale": row_scale, "column_scale": column_scale}
        scales["salient_scale"] = None if salient is None else salient.scale
        given = [finite(n, t).flatten() for n, t in scales.items() if t is not None]
        means = [] if row_mean is None else [finite("row_mean", row_mean).flatten()]
        kept = storable(torch.cat(given)).dtype
        # A small mean may lose range: what it loses is negligible compared with the row's scale.
        if means and float(means[0].abs().max()) > torch.finfo(torch.float16).max:
            kept = torch.float32
        count = 0 if salient is None else salient.codes.shape[1]
        rows, columns = negative.shape[0], negative.shape[1] + count
        stored = {**scales, "row_mean": row_mean, "bias": bias}
        stored["sign"] = pack(negative.to(torch.uint8), 1)
        if salient is not None:
            stored |= salient.packed(rows)
            stored |= {"mask": salient.mask(columns)} if shares is None else {}
        return cls.from_tensors(
            (rows, columns),
            stored,
            dtype,
            salient=count,
            row_mean=row_mean is not None,
            column_scale=column_scale is not None,
            scale_dtype=dtype_name(kept),
            shares=shares,
        )

    @property
    def shares(self) -> str | None:
        return self.spec.shares

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        if "mask" in tensors:
            marked = int(unpack(tensors["mask"], 1, self.in_features).sum())
            if marked != self.spec.salient:
                raise ValueError(
                    f"mask has {marked} salient channels: allowed is {self.spec.salient}"
                )

    def order(self) -> Tensor | None:
        """Returns the plain channels, then the salient ones: (in,) int64; None: all are plain."""
        if not self.spec.salient:
            return None
        owner = self.owner
        assert isinstance(owner, BinaryLinear)
        return reference.channel_order(owner.mask, self.in_features)

    def dequantize(self) -> Tensor:
        ordered = self.ordered()
        order = self.order()
        if order is None:
            return ordered
        owner = self.owner
        assert isinstance(owner, BinaryLinear) and owner.mask is not None
        self.check_values({"mask": owner.mask})
        return torch.empty_like(ordered).index_copy_(1, order, ordered)

    def ordered(self) -> Tensor:
        """Returns the weight with the plain channels first: (out, in) float32."""
        plain = reference.plain_weight(
            self.sign, self.row_scale, self.row_mean, self.column_scale, self.plain
        )
        if not self.spec.salient:
            return plain
        assert self.salient is not None and self.salient_scale is not None
        codes = unpack(self.salient, 4, self.spec.salient)
        salient = reference.salient_weight(codes, self.salient_scale, self.zeros())
        return torch.cat([plain, salient], 1)

    def zeros(self) -> Tensor:
        """Returns the zero points of the salient codes, if there are any: (out,) uint8."""
        assert self.salient_zero is not None
        return unpack(self.salient_zero, 4, self.out_features)

    def shared_tensors(self) -> list[Tensor]:
        return [] if self.mask is None else [self.mask]

    def prepare(self, x: Tensor) -> Tensor:
        """Returns x with the plain channels first: (..., in), same dtype."""
        order = self.order()
        return x if order is None else x.index_select(-1, order)
