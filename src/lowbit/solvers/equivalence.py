"""Initial scales of equivalent transformations: SmoothQuant's formula, AWQ's search."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowbit.blocks import Fold
from lowbit.blocks.statistics import ChannelStatistics

FLOOR = 1e-5  # of channel maxima, as OmniQuant has it
ALPHAS = tuple(i / 20 for i in range(21))
Statistics = Mapping[str, ChannelStatistics]  # by the name of a linear that reads them


def middle_shift(fold: Fold, statistics: Statistics, device: torch.device) -> Tensor:
    """(high + low) / 2 of the inputs per free channel, (fold.size,) float32; 0 where none is known.

    What stays has a range around 0, half as wide as it was high where it lay to one side.
    """
    seen = [statistics[reader] for reader in fold.readers if reader in statistics]
    if not seen:
        return torch.zeros(fold.size, device=device)
    high = _by_free_channel([s.high for s in seen], fold)
    low = -_by_free_channel([-s.low for s in seen], fold)
    return (high + low) / 2


def smooth_scale(
    fold: Fold,
    tensors: Mapping[str, Tensor],
    statistics: Statistics,
    alpha: float,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """a^alpha / w^(1 - alpha) per free channel, (fold.size,) float32.

    a: the largest |input - shift|, w: the largest |weight|, over all readers (SmoothQuant, equation
    4; OmniQuant's code takes one reader and the input as it was). shift: (fold.size,). A rotary
    fold starts at 1.
    """
    weights = [tensors[f"{reader}.weight"] for reader in fold.readers]
    if fold.kind == "rotary":
        return torch.ones(fold.size, device=weights[0].device)
    seen = [statistics[reader] for reader in fold.readers if reader in statistics]
    largest = _by_free_channel([w.abs().amax(0) for w in weights], fold)
    if seen:
        above = _by_free_channel([s.high for s in seen], fold) - shift
        below = shift + _by_free_channel([-s.low for s in seen], fold)
        a = torch.maximum(above, below)
    else:
        a = torch.ones_like(largest)
    scale = a.clamp(min=FLOOR) ** alpha / largest.clamp(min=FLOOR) ** (1 - alpha)
    return scale.clamp(min=FLOOR)


def searched_scale(
    fold: Fold,
    tensors: Mapping[str, Tensor],
    statistics: Statistics,
    quantize: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """AWQ's scale a^alpha, alpha of ALPHAS with the least output error, (fold.size,) float32.

    a: the mean |input| per channel; the result is normalised to a geometric mid-range of 1. The
    error is that of quantize(reader, weight * scale) / scale, weighted by the mean square of the
    input.
    """
    weights = {r: tensors[f"{r}.weight"] for r in fold.readers if r in statistics}
    if fold.kind == "rotary" or not weights:
        return torch.ones(fold.size, device=tensors[f"{fold.readers[0]}.weight"].device)
    a = _by_free_channel([statistics[r].absmean for r in weights], fold).clamp(min=FLOOR)
    best, least = torch.ones_like(a), float("inf")
    for alpha in ALPHAS:
        scale = a**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        per_column = scale if fold.reader_channels is None else scale[fold.reader_channels]
        error = 0.0
        for reader, weight in weights.items():
            wrong = quantize(reader, weight * per_column) / per_column - weight
            error += float((wrong.square() * statistics[reader].square).sum())
        if error < least:
            best, least = scale, error
    return best


def _by_free_channel(columns: Sequence[Tensor], fold: Fold) -> Tensor:
    """The maximum over readers, and over the columns that share a free channel: (fold.size,)."""
    largest = torch.stack(list(columns)).amax(0)
    if fold.reader_channels is None:
        return largest
    reduced = torch.full((fold.size,), -torch.inf, device=largest.device)
    channels = fold.reader_channels.to(largest.device)
    return reduced.scatter_reduce(0, channels, largest, "amax")
