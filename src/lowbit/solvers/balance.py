"""Scales of channels that make rounding lose least behind a rotation.

A rotation spreads the energy of an input x over all its channels, and that of the weight W that
reads it. With scales D of channels, which a norm absorbs, both rounding errors of the product are
then proportional to |D^-1 x|^2 |W D|^2. That is least, by Cauchy and Schwarz, if
d_i^2 = |x_i| / |w_i|. Channels that are large only because a norm multiplies them no longer matter
then.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lowbit.blocks import Fold
from lowbit.blocks.folding import Tensors

LEAST = 1e-6  # mean square of a channel, of the mean over all: scales are at most 32 times larger


def balanced_scale(
    fold: Fold, tensors: Tensors, squares: Mapping[str, Tensor], rotated: Collection[str]
) -> Tensor:
    """Returns the scale of each channel of a norm's fold: (fold.size,) float32, positive.

    tensors: the block's tensors by name.
    squares: the mean square of each input channel, (in,), by the name of the linear that reads it.
        Without that of a reader, it is estimated from the norm's own weights.
    rotated: the linears whose inputs are rotated; the others do not count.
    """
    readers = [name for name in fold.readers if name in rotated]
    weights = [tensors[f"{name}.weight"].float().square().sum(0) for name in readers]
    read = _by_channel(torch.stack(weights).sum(0), fold)
    known = [squares[name] for name in readers if name in squares]
    written = _by_channel(torch.stack(known).mean(0), fold) if known else _estimated(fold, tensors)
    written, read = (_bounded(energy) for energy in (written, read))
    scale = (written / read).pow(0.25)
    return scale / scale.log().mean().exp()


def _bounded(energy: Tensor) -> Tensor:
    mean = energy.mean()
    return energy.clamp(min=float(mean) * LEAST) / mean if mean > 0 else torch.ones_like(energy)


def _estimated(fold: Fold, tensors: Tensors) -> Tensor:
    """Returns the mean square of each channel of a norm's output, if it normalises noise."""
    weight, bias = tensors[f"{fold.source}.weight"].float(), tensors.get(f"{fold.source}.bias")
    energy = (weight + fold.offset).square()
    return energy if bias is None else energy + bias.float().square()


def _by_channel(columns: Tensor, fold: Fold) -> Tensor:
    """Returns the sum over all columns of a free channel: (in,) -> (fold.size,)."""
    if fold.reader_channels is None:
        return columns
    total = torch.zeros(fold.size, device=columns.device)
    return total.index_add(0, fold.reader_channels.to(columns.device), columns)
