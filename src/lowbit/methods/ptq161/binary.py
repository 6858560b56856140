"""Binary weights: choose the salient channels, and approximate the others by signs and scales.

The channels that are not salient are called plain. Their weights are approximated by

    W[i, j] ~ column[j] * (mean[i] + row[i] * sigma[i, j])        sigma[i, j] = 1 or -1

Source: PTQ1.61 (ACL 2025, arXiv 2502.13179), equations 4 and 9.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOLERANCE = 0.1  # share by which alignment may change the number of salient channels
ROUNDS = 10  # of alternating least squares; more lower the weighted error by less than 1 %
NARROWEST = 0.05  # the least column scale, as a share of the mean column scale


@dataclass(frozen=True)
class Binary:
    """The binary weights of the plain channels of a linear.

    row: (out,) float32, the scale of each output row.
    mean: (out,) float32, the mean of each output row.
    column: (plain,) float32, the scale of each plain channel, positive.
    negative: (out, plain) bool, where sigma is -1.
    """

    row: Tensor
    mean: Tensor
    column: Tensor
    negative: Tensor

    def signs(self) -> Tensor:
        """Returns the sign of each plain weight, sigma: (out, plain) float32, 1 or -1."""
        return 1 - 2 * self.negative.float()

    def weight(self) -> Tensor:
        """Returns the approximated weight: (out, plain) float32."""
        return self._unscaled() * self.column

    def _unscaled(self) -> Tensor:
        return self.signs().mul_(self.row.unsqueeze(1)).add_(self.mean.unsqueeze(1))


def salient_count(channels: int, ratio: float, alignment: int) -> int:
    """Returns how many input channels are salient (kept at 4 bits).

    The count is a multiple of `alignment`, since packed kernels need that. If this moves it by more
    than 10 % from ratio * channels, or makes all channels salient, a smaller power of two is used.
    At least one channel is salient unless the ratio is 0, and at least one is not.

    channels: the number of all channels.
    ratio: the wanted share of salient channels, from 0 to 1.
    alignment: the power of two that the count should be a multiple of.
    """
    wanted = ratio * channels
    if wanted == 0:
        return 0
    while alignment > 1:
        count = round(wanted / alignment) * alignment
        if abs(count - wanted) <= TOLERANCE * wanted and count < channels:
            return count
        alignment //= 2
    return min(max(round(wanted), 1), channels - 1)


def salient_mask(salience: Tensor, count: int) -> Tensor:
    """Returns a mask of the `count` channels with the largest salience: (in,) bool.

    Among equal channels the first ones are taken.

    salience: (in,).
    """
    mask = torch.zeros_like(salience, dtype=torch.bool)
    mask[salience.argsort(descending=True, stable=True)[:count]] = True
    return mask


def binarized(weight: Tensor, with_mean: bool) -> Binary:
    """Binarises a weight by the signs around each row's mean, without column scales.

    The scale of a row is the mean |weight - mean|, which has the least squared error.

    weight: (out, plain) float32.
    with_mean: whether rows have a mean; if not, it is 0.
    """
    mean = weight.mean(1) if with_mean else weight.new_zeros(len(weight))
    centred = weight - mean.unsqueeze(1)
    column = weight.new_ones(weight.shape[1])
    return Binary(centred.abs().mean(1), mean, column, centred < 0)


def alternated(weight: Tensor, importance: Tensor, with_mean: bool, rounds: int = ROUNDS) -> Binary:
    """Binarises a weight and improves columns, signs and rows in turn by least squares.

    No step makes the weighted squared error larger.

    weight: (out, plain) float32.
    importance: (plain,), the mean square of each input. The weighted error is then the error
        of the output, if channels are uncorrelated.
    with_mean: whether rows have a mean.
    rounds: how often columns, signs and rows are improved.
    """
    if not bool(importance.sum() > 0):
        importance = torch.ones_like(importance)
    binary = binarized(weight, with_mean)
    for _ in range(rounds):
        binary = _with_columns(binary, weight)
        targets = weight / binary.column
        binary = replace(binary, negative=targets < binary.mean.unsqueeze(1))
        binary = _with_rows(binary, targets, importance * binary.column.square(), with_mean)
    # Only products of row and column scales matter: columns get a geometric mean of 1, far from the
    # limits of their stored dtype.
    size = binary.column.log().mean().exp()
    return Binary(binary.row * size, binary.mean * size, binary.column / size, binary.negative)


def _with_columns(binary: Binary, weight: Tensor) -> Binary:
    """Improves the column scales; none becomes 0, since other steps divide by them."""
    unscaled = binary._unscaled()
    energy = unscaled.square().sum(0)
    best = (weight * unscaled).sum(0) / energy.clamp(min=torch.finfo(torch.float32).tiny)
    old = binary.column
    # The error falls all the way from the old scale to the best, so a limited step lowers it too.
    limit = torch.minimum(old, NARROWEST * old.mean())
    return replace(binary, column=torch.where(energy > 0, torch.maximum(best, limit), old))


def _with_rows(binary: Binary, targets: Tensor, importance: Tensor, with_mean: bool) -> Binary:
    """Returns the binary weight with the best row scales and means for its signs.

    targets: (out, plain), the values that row * sigma + mean approximates.
    importance: (plain,), the weight of each channel's squared error.
    """
    signs = binary.signs()
    total, balance = importance.sum(), signs @ importance
    along, level = (targets * signs) @ importance, targets @ importance
    if not with_mean:
        return replace(binary, row=along / total)
    # If all signs of a row are equal, scale and mean are not determined: that row is not changed.
    determinant = total.square() - balance.square()
    solvable = determinant > 1e-6 * total.square()
    divisor = determinant.where(solvable, 1)
    row = (total * along - balance * level) / divisor
    mean = (total * level - balance * along) / divisor
    return replace(
        binary, row=row.where(solvable, binary.row), mean=mean.where(solvable, binary.mean)
    )


def refit_gain(hessian: Tensor, mask: Tensor, damping: float) -> Tensor | None:
    """Returns the matrix by which the salient weights compensate the error of the plain ones.

    With W_S + (W_B - W^_B) gain as salient weights, where W_B are the plain weights and W^_B their
    binary approximation, E[|W x - W^ x|^2] is least. gain = H_BS (H_SS + damping)^-1.

    hessian: (in, in).
    mask: (in,) bool, the salient channels.
    damping: the share of the mean diagonal of H_SS that is added to its diagonal.

    Returns gain, (plain, salient), or None if H_SS is not positive definite.
    """
    inner = hessian[mask][:, mask]
    inner = inner + damping * inner.diagonal().mean() * torch.eye(len(inner), device=inner.device)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed or not bool(factor.isfinite().all()):
        return None
    return torch.cholesky_solve(hessian[mask][:, ~mask], factor).T
