"""Losses at widths that were not measured, from the losses at those that were."""

import math
from collections.abc import Mapping, Sequence

# Another bit per weight divides the mean squared error of rounding by 4 (6.02 dB), and the KL
# divergence, which is quadratic in small errors, with it.
FALL = 4.0


def losses_at(widths: Sequence[float], measured: Mapping[float, float]) -> list[float]:
    """Returns the loss at each width; more bits are never worse.

    Between two measured widths the logarithm of the loss is interpolated. Beyond the measured ones
    the loss falls by FALL with every bit.

    widths: bits per weight.
    measured: the loss in nats by bits per weight, at one width or more.
    """
    known = sorted(measured)
    least, falling = math.inf, dict[float, float]()
    for width in known:
        least = min(least, measured[width])
        falling[width] = least
    return [_loss_at(width, known, falling) for width in widths]


def _loss_at(width: float, known: Sequence[float], losses: Mapping[float, float]) -> float:
    if width in losses:
        return losses[width]
    below = [each for each in known if each < width]
    above = [each for each in known if each > width]
    if not below or not above:
        nearest = below[-1] if below else above[0]
        return losses[nearest] * FALL ** (nearest - width)
    low, high = below[-1], above[0]
    if losses[high] <= 0:
        return losses[high] if losses[low] <= 0 else losses[low] * FALL ** (low - width)
    share = (width - low) / (high - low)
    return float(losses[low] ** (1 - share) * losses[high] ** share)
