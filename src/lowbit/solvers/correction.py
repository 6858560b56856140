"""Corrected targets: a weight that makes up for what the layers before it have lost.

A linear of the half-quantized model reads x~ where the float model's reads x. What is wanted is
W x. With H = E[x~ x~^T] and D = E[(x - x~) x~^T], the weight W* = W (H + D) H^-1 comes closest:

    E|W x - Q x~|^2 = tr((W* - Q) H (W* - Q)^T) + a constant

So W* is rounded instead of W. Both expectations are estimated from few tokens, and the whole step
from W to W* would fit their noise. Its length, the strength, is therefore measured: the step of
one half of the calibration windows is tried on the other half, where the best length is known in
closed form, and the reverse. Source: Qronos (arXiv 2505.11695); the strength is our own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.blocks.moments import PairedMoments
from lowbit.kernels.products import product

HALVES = ((0, 1), (1, 0))  # (the half that gives the step, the half on which it is tried)


@dataclass(frozen=True)
class Target:
    """What a linear's weight is rounded for.

    weight: (out, in) float32, W moved towards W* by the strength.
    strength: 0 to 1; 0: the weight is W itself; None: nothing was measured, and it is W too.
    """

    weight: Tensor
    strength: float | None


def corrected(weight: Tensor, moments: PairedMoments, damping: float) -> Target:
    """Returns the target for a weight W (out, in).

    damping: the share of H's mean diagonal that is added to its diagonal.
    """
    device = weight.device
    above = below = 0.0
    for half, other in HALVES:
        move = _move(weight, moments, (half,), damping)
        hessian, drift = moments.mean((other,), device)
        if move is None or not hessian.tokens:
            return Target(weight, 0.0)
        above += float((product(weight, drift) * move).sum())
        below += float((product(move, hessian.matrix) * move).sum())
    strength = min(max(above / below, 0.0), 1.0) if below > 0 else 0.0
    move = _move(weight, moments, (0, 1), damping) if strength else None
    if move is None:
        return Target(weight, 0.0)
    return Target(weight + strength * move, strength)


def _move(
    weight: Tensor, moments: PairedMoments, halves: tuple[int, ...], damping: float
) -> Tensor | None:
    """Returns W* - W, from some halves of the windows; None if H is not positive definite."""
    hessian, drift = moments.mean(halves, weight.device)
    mean = hessian.matrix.diagonal().mean()
    if not hessian.tokens or not torch.isfinite(hessian.matrix).all() or mean <= 0:
        return None
    damped = hessian.matrix / mean
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    wanted = product(weight, drift / mean)
    solved: Tensor = torch.cholesky_solve(wanted.T, factor).T
    return solved if torch.isfinite(solved).all() else None


def output_error(weight: Tensor, values: Tensor, name: str, moments: PairedMoments) -> float:
    """Returns E|W x - Q x~|^2 / E|W x|^2: how far the output is from the float model's.

    weight, values: (out, in), the float model's weight W and the rounded weight Q.
    name: of the linear.
    """
    hessian, drift = moments.mean((0, 1), weight.device)
    error = weight - values
    # W x - Q x~ = W (x - x~) + (W - Q) x~: the terms do not cancel where both are small.
    lost = (
        2 * (product(weight, drift) * error).sum() + (product(error, hessian.matrix) * error).sum()
    )
    tokens = max(moments.tokens, 1)
    energy = moments.energies.get(name, 0.0) / tokens
    total = float(lost) + moments.drifts.get(name, 0.0) / tokens
    return max(total, 0.0) / energy if energy > 0 else 0.0
