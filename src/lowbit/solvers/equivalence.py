"""Initial scales and shifts of folds: by SmoothQuant's formula or by AWQ's search."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowbit.blocks import Fold
from lowbit.blocks.statistics import ChannelStatistics

FLOOR = 1e-5  # the least channel maximum, as in OmniQuant's code
ALPHAS = tuple(i / 20 for i in range(21))
Statistics = Mapping[str, ChannelStatistics]  # of its input, by the name of the linear


def middle_shift(fold: Fold, statistics: Statistics, device: torch.device) -> Tensor:
    """Returns the middle of each channel's range, (high + low) / 2: (fold.size,) float32.

    The shifted inputs have a range that is centred at 0. For a channel whose values have one sign,
    the largest |input| is then at most half of what it was.

    statistics: the statistics of the readers' inputs; without any, the shift is 0.
    """
    inputs = [statistics[reader] for reader in fold.readers if reader in statistics]
    if not inputs:
        return torch.zeros(fold.size, device=device)
    high = _by_free_channel([s.high for s in inputs], fold)
    low = -_by_free_channel([-s.low for s in inputs], fold)
    return (high + low) / 2


def smooth_scale(
    fold: Fold,
    tensors: Mapping[str, Tensor],
    statistics: Statistics,
    alpha: float,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """Returns SmoothQuant's scale a^alpha / w^(1 - alpha) of each channel: (fold.size,) float32.

    a is the largest |input - shift| and w the largest |weight| over all readers. (OmniQuant's code
    looks at one reader, and at the input before the shift.) A rotary fold has the scale 1.

    tensors: the block's tensors by name.
    statistics: the statistics of the readers' inputs; without any, a is 1.
    alpha: the exponent, from 0 (only weights count) to 1 (only inputs count).
    shift: (fold.size,), subtracted from the input.

    Source: SmoothQuant (arXiv 2211.10438), equation 4.
    """
    weights = [tensors[f"{reader}.weight"] for reader in fold.readers]
    if fold.kind == "rotary":
        return torch.ones(fold.size, device=weights[0].device)
    inputs = [statistics[reader] for reader in fold.readers if reader in statistics]
    largest = _by_free_channel([w.abs().amax(0) for w in weights], fold)
    if inputs:
        above = _by_free_channel([s.high for s in inputs], fold) - shift
        below = shift + _by_free_channel([-s.low for s in inputs], fold)
        a = torch.maximum(above, below)
    else:
        a = torch.ones_like(largest)
    scale = a.clamp(min=FLOOR) ** alpha / largest.clamp(min=FLOOR) ** (1 - alpha)
    return scale.clamp(min=FLOOR)


def searched_scale(
    fold: Fold,
    tensors: Mapping[str, Tensor],
    statistics: Statistics,
    squared_error: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """Returns AWQ's scale of each channel, a^alpha with the best alpha: (fold.size,) float32.

    a is the mean |input|. Scales are normalised so that sqrt(largest * smallest) is 1. The best of
    ALPHAS is the one with the least error of the rounded weight * scale, divided by scale and
    weighted by the mean square of each input channel. A rotary fold has the scale 1.

    tensors: the block's tensors by name.
    statistics: the statistics of the readers' inputs; readers without any are left out.
    squared_error: returns the squared error of rounding a weight of the named reader, (out, in).

    Source: AWQ (Lin et al., arXiv 2306.00978), section 3.2.
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
            squares = squared_error(reader, weight * per_column) / per_column.square()
            error += float((squares * statistics[reader].square).sum())
        if error < least:
            best, least = scale, error
    return best


def _by_free_channel(columns: Sequence[Tensor], fold: Fold) -> Tensor:
    """Returns the maximum over readers and over all columns of a free channel: (fold.size,)."""
    largest = torch.stack(list(columns)).amax(0)
    if fold.reader_channels is None:
        return largest
    reduced = torch.full((fold.size,), -torch.inf, device=largest.device)
    channels = fold.reader_channels.to(largest.device)
    return reduced.scatter_reduce(0, channels, largest, "amax")
