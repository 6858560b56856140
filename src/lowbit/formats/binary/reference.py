"""The reference of the binary format: its arithmetic in plain torch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend
from lowbit.formats.tiles import by_rows
from lowbit.kernels.bits import unpack

if TYPE_CHECKING:
    from lowbit.formats.binary import BinaryLinear


class Reference(Backend["BinaryLinear"]):
    """Sums inputs and scales the sums, so that the weight is never dequantized.

    plain channels, with u = column_scale * x:  row_scale * sum(+-u) + row_mean * sum(u)
    salient channels:                           salient_scale * (sum(code * x) - zero * sum(x))

    Computes in float32, or in float64 for inputs of float64.
    """

    name = "reference"

    def multiply(
        self, layer: "BinaryLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        x = prepared if prepared.dtype == torch.float64 else prepared.float()
        y = self._plain_product(layer, x[:, : layer.plain])
        if not layer.spec.salient:
            return y
        return y + self._salient_product(layer, x[:, layer.plain :])

    def signed_sums(self, packed: Tensor, x: Tensor) -> Tensor:
        """Adds the inputs whose bit is 0 and subtracts those whose bit is 1.

        packed: (out, ceil(n / 8)) uint8, one bit for each input.
        x: (tokens, n).

        Returns (tokens, out).
        """
        return x.sum(1, keepdim=True) - 2 * _unpacked_sums(packed, 1, x)

    def weighted_sums(self, packed: Tensor, x: Tensor) -> Tensor:
        """Sums inputs times codes of 4 bits.

        packed: (out, ceil(n / 2)) uint8, one code for each input.
        x: (tokens, n).

        Returns (tokens, out).
        """
        return _unpacked_sums(packed, 4, x)

    def _plain_product(self, layer: "BinaryLinear", x: Tensor) -> Tensor:
        """Multiplies by the plain channels. x: (tokens, plain) -> (tokens, out)"""
        u = x if layer.column_scale is None else x * layer.column_scale.float()
        y = self.signed_sums(layer.sign, u) * layer.row_scale.float()
        if layer.row_mean is None:
            return y
        return y + u.sum(1, keepdim=True) * layer.row_mean.float()

    def _salient_product(self, layer: "BinaryLinear", x: Tensor) -> Tensor:
        """Multiplies by the salient channels. x: (tokens, salient) -> (tokens, out)"""
        assert layer.salient is not None and layer.salient_scale is not None
        sums = self.weighted_sums(layer.salient, x)
        return (sums - x.sum(1, keepdim=True) * layer.zeros()) * layer.salient_scale.float()


def _unpacked_sums(packed: Tensor, bits: int, x: Tensor) -> Tensor:
    """Sums inputs times unsigned codes. x: (tokens, n) -> (tokens, out)"""

    def product(codes: Tensor, packed: Tensor) -> Tensor:
        return functional.linear(x, codes.copy_(unpack(packed, bits, x.shape[1])))

    return by_rows(x, (len(packed), x.shape[1]), product, [packed], x.dtype)


def channel_order(mask: Tensor | None, in_features: int) -> Tensor | None:
    """Returns the plain channels, then the salient ones, each ascending: (in,) int64.

    mask: (ceil(in / 8),) uint8; None: all channels are plain, and the result is None.
    """
    return None if mask is None else unpack(mask, 1, in_features).argsort(stable=True)


def plain_weight(
    sign: Tensor,
    row_scale: Tensor,
    row_mean: Tensor | None,
    column_scale: Tensor | None,
    count: int,
) -> Tensor:
    """Computes column_scale * (row_mean +- row_scale) in float32, for `count` plain channels.

    sign: (out, ceil(count / 8)) uint8.
    row_scale, row_mean: (out,).
    column_scale: (count,).

    Returns (out, count) float32.
    """
    scale = row_scale.float().unsqueeze(1)
    weight = torch.where(unpack(sign, 1, count).bool(), -scale, scale)
    if row_mean is not None:
        weight += row_mean.float().unsqueeze(1)
    return weight if column_scale is None else weight.mul_(column_scale.float())


def salient_weight(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Computes scale * (code - zero) in float32.

    codes: (out, salient) uint8.
    scale: (out,).
    zero: (out,) uint8.

    Returns (out, salient) float32.
    """
    return (codes.float() - zero.float().unsqueeze(1)).mul_(scale.float().unsqueeze(1))


def round_salient(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Rounds to the nearest codes; a row whose scale is 0 gets its zero point.

    weight: (out, salient).
    scale: (out,).
    zero: (out,) uint8.

    Returns (out, salient) uint8.
    """
    # A row whose scale is 0 is divided by infinity, because a division by 0 could give NaN.
    step = scale.float().masked_fill(scale == 0, torch.inf).unsqueeze(1)
    codes = (weight.float() / step).round_() + zero.float().unsqueeze(1)
    return codes.clamp_(0, 15).to(torch.uint8)
