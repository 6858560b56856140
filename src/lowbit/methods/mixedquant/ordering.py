"""Which inputs of a linear stay float, and in which order the others are cut into groups.

MixedQuant: inputs of like magnitude share a group, so that a group's scale fits all of them, and
the few salient ones are left out of the groups. Both are settled from calibration, once: an order
found anew for each call (as in the original code) lets a token change what earlier tokens gave.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lowbit.blocks.statistics import ChannelStatistics

Salience = Literal["absmean", "absmax", "weighted"]
Sort = Literal["none", "max", "mean3std", "argmax", "weight_max"]


def salient_count(ratio: float, alignment: int, inputs: int) -> int:
    """The multiple of `alignment` nearest to ratio * inputs; at least one of them, if any.

    One input at least stays ordinary; where nothing fits beside it the count is 0.
    """
    if ratio == 0:
        return 0
    units = max(1, round(ratio * inputs / alignment))
    return min(units, (inputs - 1) // alignment) * alignment


def importance(kind: Salience, seen: ChannelStatistics, weights: Sequence[Tensor]) -> Tensor:
    """How much an input matters: (in,).

    weights: (out, in) of all linears that read it. absmean as AWQ and the original code have it;
    weighted: absmean times the norm of the input's columns.
    """
    if kind == "absmax":
        return seen.absmax
    return seen.absmean * column_norm(weights) if kind == "weighted" else seen.absmean


def sort_key(sort: Sort, seen: ChannelStatistics, weights: Sequence[Tensor]) -> Tensor:
    """By what inputs are sorted, ascending: (in,).

    max: of |x|. mean3std: of |x|, mean + 3 standard deviations. argmax: the place in its sequence
    of the token with the largest |x|. weight_max: of |weight|, over all that read the input.
    """
    if sort == "max":
        return seen.absmax
    if sort == "mean3std":
        return seen.absmean + 3 * seen.deviation
    if sort == "argmax":
        return seen.position
    if sort == "weight_max":
        return column_max(weights)
    return torch.zeros_like(seen.absmax)


def column_max(weights: Sequence[Tensor]) -> Tensor:
    """The largest |weight| of each column: (in,)."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)


def column_norm(weights: Sequence[Tensor]) -> Tensor:
    """The norm of each column over all weights: (in,)."""
    return torch.stack([weight.square().sum(0) for weight in weights]).sum(0).sqrt()


def channel_order(key: Tensor, importance: Tensor, salient: int) -> Tensor:
    """(in,) int64: the ordinary inputs by ascending key, then the salient ones by their number.

    Equal keys keep their order, and so does everything where nothing is sorted or salient.
    """
    chosen = importance.argsort(descending=True, stable=True)[:salient]
    stays = torch.zeros(len(key), dtype=torch.bool, device=key.device)
    stays[chosen] = True
    ordinary = (~stays).nonzero().squeeze(1)
    ordinary = ordinary[key[ordinary].argsort(stable=True)]
    return torch.cat([ordinary, stays.nonzero().squeeze(1)])


def is_identity(order: Tensor) -> bool:
    return bool((order == torch.arange(len(order), device=order.device)).all())
