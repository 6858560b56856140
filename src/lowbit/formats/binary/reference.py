"""The definition of the binary format's arithmetic, in torch: `lookup` is tested against it."""

import torch
from torch import Tensor

from lowbit.kernels.bits import unpack


def channel_order(mask: Tensor | None, in_features: int) -> Tensor | None:
    """The plain channels, then the salient ones, each ascending: (in,) int64; None: all plain.

    mask: (ceil(in / 8),) uint8, or None
    """
    return None if mask is None else unpack(mask, 1, in_features).argsort(stable=True)


def plain_weight(
    sign: Tensor,
    row_scale: Tensor,
    row_mean: Tensor | None,
    column_scale: Tensor | None,
    count: int,
) -> Tensor:
    """column_scale * (row_mean +- row_scale) in float32, for `count` plain channels.

    sign: (out, ceil(count / 8)) uint8  row_scale, row_mean: (out,)  column_scale: (count,)
    -> (out, count) float32
    """
    scale = row_scale.float().unsqueeze(1)
    weight = torch.where(unpack(sign, 1, count).bool(), -scale, scale)
    if row_mean is not None:
        weight += row_mean.float().unsqueeze(1)
    return weight if column_scale is None else weight.mul_(column_scale.float())


def salient_weight(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """scale * (code - zero) in float32.

    codes: (out, salient) uint8  scale: (out,)  zero: (out,) uint8  ->  (out, salient) float32
    """
    return (codes.float() - zero.float().unsqueeze(1)).mul_(scale.float().unsqueeze(1))


def round_salient(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest codes; a row whose scale is 0 gets its zero point.

    weight: (out, salient)  scale: (out,)  zero: (out,) uint8  ->  (out, salient) uint8
    """
    # A division by infinity is the 0 that a row without a scale should get, and never NaN.
    step = scale.float().masked_fill(scale == 0, torch.inf).unsqueeze(1)
    codes = (weight.float() / step).round_() + zero.float().unsqueeze(1)
    return codes.clamp_(0, 15).to(torch.uint8)
