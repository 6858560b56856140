"""Binary weights with a structured mask: which channels are salient, and signs with their scales.

PTQ1.61 (ACL 2025, arXiv 2502.13179), equations 4 and 9. Plain channels, those that are not salient,
are approximated by

    W[i, j] ~ column[j] * (mean[i] + row[i] * sigma[i, j])        sigma = 1 or -1
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOLERANCE = 0.1  # share by which aligning may change the count of salient channels
ROUNDS = 10  # of alternating least squares; the weighted error falls by less than 1 % after these
NARROWEST = 0.05  # of the mean of the column scales: what a column that hardly counts keeps


@dataclass(frozen=True)
class Binary:
    """row, mean: (out,) float32  column: (plain,) float32, positive
    negative: (out, plain) bool, where sigma is -1"""

    row: Tensor
    mean: Tensor
    column: Tensor
    negative: Tensor

    def signs(self) -> Tensor:
        """(out, plain) float32 of 1 and -1"""
        return 1 - 2 * self.negative.float()

    def weight(self) -> Tensor:
        """(out, plain) float32"""
        return self._unscaled() * self.column

    def _unscaled(self) -> Tensor:
        return self.signs().mul_(self.row.unsqueeze(1)).add_(self.mean.unsqueeze(1))


def salient_count(channels: int, ratio: float, alignment: int) -> int:
    """How many of the channels are salient: a share, aligned for the kernels' sake.

    alignment: a power of two, halved until the count is within a tenth of what is asked for. At
    least one channel is salient unless the ratio is 0, and one is plain.
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
    """The `count` channels with most salience; of equal ones the first.

    salience: (in,)  ->  (in,) bool
    """
    mask = torch.zeros_like(salience, dtype=torch.bool)
    mask[salience.argsort(descending=True, stable=True)[:count]] = True
    return mask


def binarized(weight: Tensor, with_mean: bool) -> Binary:
    """Signs around the mean of a row, and the scale with the least squared error.

    weight: (out, plain) float32
    """
    mean = weight.mean(1) if with_mean else weight.new_zeros(len(weight))
    centred = weight - mean.unsqueeze(1)
    column = weight.new_ones(weight.shape[1])
    return Binary(centred.abs().mean(1), mean, column, centred < 0)


def alternated(weight: Tensor, importance: Tensor, with_mean: bool, rounds: int = ROUNDS) -> Binary:
    """`binarized`, improved by alternating least squares for signs, rows and columns in turn.

    weight: (out, plain) float32  importance: (plain,), the mean square of each input, so that the
    error is that of the output if channels were uncorrelated. No step makes it larger.
    """
    if not bool(importance.sum() > 0):
        importance = torch.ones_like(importance)
    binary = binarized(weight, with_mean)
    for _ in range(rounds):
        binary = _with_columns(binary, weight)
        targets = weight / binary.column
        binary = replace(binary, negative=targets < binary.mean.unsqueeze(1))
        binary = _with_rows(binary, targets, importance * binary.column.square(), with_mean)
    # Only products of rows and columns count: columns are kept around 1, far from all limits.
    size = binary.column.log().mean().exp()
    return Binary(binary.row * size, binary.mean * size, binary.column / size, binary.negative)


def _with_columns(binary: Binary, weight: Tensor) -> Binary:
    """The best columns, none of which may vanish: other steps divide by them."""
    unscaled = binary._unscaled()
    energy = unscaled.square().sum(0)
    best = (weight * unscaled).sum(0) / energy.clamp(min=torch.finfo(torch.float32).tiny)
    old = binary.column
    # Between the old and the best, the error falls: so too where the limit stops it.
    limit = torch.minimum(old, NARROWEST * old.mean())
    return replace(binary, column=torch.where(energy > 0, torch.maximum(best, limit), old))


def _with_rows(binary: Binary, targets: Tensor, importance: Tensor, with_mean: bool) -> Binary:
    """The best row scales and means for given signs.

    targets: (out, plain), what row * sigma + mean should be  importance: (plain,)
    """
    signs = binary.signs()
    total, balance = importance.sum(), signs @ importance
    along, level = (targets * signs) @ importance, targets @ importance
    if not with_mean:
        return replace(binary, row=along / total)
    # Where all signs are equal, row and mean cannot be told apart: those rows stay as they are.
    determinant = total.square() - balance.square()
    solvable = determinant > 1e-6 * total.square()
    divisor = determinant.where(solvable, 1)
    row = (total * along - balance * level) / divisor
    mean = (total * level - balance * along) / divisor
    return replace(
        binary, row=row.where(solvable, binary.row), mean=mean.where(solvable, binary.mean)
    )


def refit_gain(hessian: Tensor, mask: Tensor, damping: float) -> Tensor | None:
    """What the salient weights gain by the error of the others, to take up as much as they can.

    H_BS (H_SS + damping)^-1: with W_S + (W_B - W^_B) gain, E[|W x - W^ x|^2] is least.
    hessian: (in, in)  mask: (in,) bool  damping: share of the mean diagonal
    ->  (plain, salient), or None where H_SS is not positive definite
    """
    inner = hessian[mask][:, mask]
    inner = inner + damping * inner.diagonal().mean() * torch.eye(len(inner), device=inner.device)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed or not bool(factor.isfinite().all()):
        return None
    return torch.cholesky_solve(hessian[mask][:, ~mask], factor).T
