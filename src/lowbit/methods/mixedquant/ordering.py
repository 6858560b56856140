"""Choose the inputs of a linear that stay float, and the order in which the others form groups.

In MixedQuant, inputs of similar magnitude share a group, so that the group's scale fits all of
them, and the few salient inputs are in no group. Both are determined once, from calibration text.
(The original code sorts anew in each call, so that a token changes the results of earlier tokens.)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lowbit.blocks.statistics import ChannelStatistics

Salience = Literal["absmean", "absmax", "weighted"]
Sort = Literal["none", "max", "mean3std", "argmax", "weight_max"]


def salient_count(ratio: float, alignment: int, inputs: int) -> int:
    """Returns the number of salient inputs: the multiple of `alignment` nearest to ratio * inputs.

    It is at least `alignment` unless the ratio is 0. At least one input is not salient; if there
    are too few inputs for both, the count is 0.
    """
    if ratio == 0:
        return 0
    units = max(1, round(ratio * inputs / alignment))
    return min(units, (inputs - 1) // alignment) * alignment


def importance(
    salience: Salience, statistics: ChannelStatistics, weights: Sequence[Tensor]
) -> Tensor:
    """Returns the importance of each input, by which salient ones are chosen: (in,).

    salience: "absmean" (as in AWQ and the original code), "absmax", or "weighted": absmean times
        the norm of the input's weights.
    statistics: the statistics of the input.
    weights: (out, in) each, of all linears that read the input.
    """
    if salience == "absmax":
        return statistics.absmax
    if salience == "weighted":
        return statistics.absmean * column_norm(weights)
    return statistics.absmean


def sort_key(sort: Sort, statistics: ChannelStatistics, weights: Sequence[Tensor]) -> Tensor:
    """Returns the key by which inputs are sorted in ascending order: (in,).

    sort: "max": the maximum of |x|; "mean3std": its mean and 3 standard deviations; "argmax": the
        position in its sequence of the token with the largest |x|; "weight_max": the maximum of
        |weight|; "none": all keys are equal.
    statistics: the statistics of the input.
    weights: (out, in) each, of all linears that read the input.
    """
    if sort == "max":
        return statistics.absmax
    if sort == "mean3std":
        return statistics.absmean + 3 * statistics.deviation
    if sort == "argmax":
        return statistics.position
    if sort == "weight_max":
        return column_max(weights)
    return torch.zeros_like(statistics.absmax)


def column_max(weights: Sequence[Tensor]) -> Tensor:
    """Returns the largest |weight| of each column: (in,)."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)


def column_norm(weights: Sequence[Tensor]) -> Tensor:
    """Returns the norm of each column over all weights: (in,)."""
    return torch.stack([weight.square().sum(0) for weight in weights]).sum(0).sqrt()


def channel_order(key: Tensor, importance: Tensor, salient: int) -> Tensor:
    """Returns the order of inputs: ordinary ones by ascending key, then salient ones by index.

    Inputs with equal keys keep their order.

    key: (in,), from `sort_key`.
    importance: (in,); the most important inputs are the salient ones.
    salient: the number of salient inputs.

    Returns (in,) int64, the input at each position.
    """
    chosen = importance.argsort(descending=True, stable=True)[:salient]
    stays = torch.zeros(len(key), dtype=torch.bool, device=key.device)
    stays[chosen] = True
    ordinary = (~stays).nonzero().squeeze(1)
    ordinary = ordinary[key[ordinary].argsort(stable=True)]
    return torch.cat([ordinary, stays.nonzero().squeeze(1)])


def is_identity(order: Tensor) -> bool:
    return bool((order == torch.arange(len(order), device=order.device)).all())
