"""Rounding with linear feedback: block LDLQ, of which GPTQ is the scalar case, and greedy passes.

The error of a layer is tr((W - Q) H (W - Q)^T), H = E[x x^T]. Columns are rounded block by block
from the last to the first; each target takes up the errors already made, so that H weighs them
(QuIP, arXiv 2307.13304, section 3; QuIP#, arXiv 2402.04396, section 4).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (first column of the block, target (rows, block)) -> codes (rows, ...), values (rows, block)
Quantize = Callable[[int, Tensor], tuple[Tensor, Tensor]]

SLAB = 128  # columns whose feedback is gathered in one matrix product
MOST_DAMPING = 10  # how often more damping is added to a Hessian that is not positive definite


@dataclass(frozen=True)
class Rounded:
    """values: (rows, columns) float32. codes: (rows, blocks, ...), as the quantizer gave them."""

    values: Tensor
    codes: Tensor


def damped_factor(hessian: Tensor, damping: float, block: int) -> tuple[Tensor, Tensor] | None:
    """(damped H, L); None for a Hessian that is not positive definite with ten times the damping.

    hessian: (n, n) float32, n divisible by `block`. damping: share of the mean diagonal that is
    added. H = L D L^T is over that mean; L: (n, n), unit lower block triangular.
    """
    mean = hessian.diagonal().mean()
    if not torch.isfinite(hessian).all() or mean <= 0:
        return None
    eye = torch.eye(len(hessian), device=hessian.device)
    for attempt in range(1, MOST_DAMPING + 1):
        damped = hessian / mean + attempt * damping * eye
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(lower).all():
            return damped, _block_unit(lower, block)
    return None


def _block_unit(lower: Tensor, block: int) -> Tensor:
    """Each column panel times the inverse of its diagonal block."""
    n = len(lower)
    panels = lower.view(n, n // block, block)
    diagonal = torch.stack([lower[k : k + block, k : k + block] for k in range(0, n, block)])
    inverse = torch.linalg.inv(diagonal)
    return torch.einsum("npb,pbc->npc", panels, inverse).reshape(n, n)


def round_with_feedback(weight: Tensor, factor: Tensor, quantize: Quantize, block: int) -> Rounded:
    """Block LDLQ: target_k = W_k + (W - Q)_{:, >k} L_{>k, k}.

    weight: (rows, n)  factor: (n, n) from `damped_factor`. quantize is called from the last block
    to the first. Slabs gather the feedback of finished columns; n need not be divisible by SLAB.
    """
    rows, n = weight.shape
    error = torch.zeros_like(weight)
    values = torch.zeros_like(weight)
    codes: dict[int, Tensor] = {}
    for stop in range(n, 0, -SLAB):
        start = max(0, stop - SLAB)
        target = weight[:, start:stop] + error[:, stop:] @ factor[stop:, start:stop]
        for k in range(stop - block, start - 1, -block):
            here = slice(k, k + block)
            near = error[:, k + block : stop] @ factor[k + block : stop, here]
            codes[k], values[:, here] = quantize(k, target[:, k - start : k - start + block] + near)
            error[:, here] = weight[:, here] - values[:, here]
    return Rounded(values, torch.stack([codes[k] for k in sorted(codes)], 1))


def greedy_pass(
    weight: Tensor, hessian: Tensor, rounded: Rounded, quantize: Quantize, block: int
) -> Rounded:
    """One coordinate descent over blocks that never makes any row worse.

    hessian: (n, n), the damped one. The nearest codeword to the minimiser over a block is taken
    only by the rows whose loss it lowers: in the metric of H it need not be the best (an unguarded
    pass doubled the loss on a spectrum k^-1.5). Slabs gather the gradients, as they do feedback.
    """
    values, codes = rounded.values.clone(), rounded.codes.clone()
    n = weight.shape[1]
    diagonal = torch.stack([hessian[k : k + block, k : k + block] for k in range(0, n, block)])
    inverses = torch.linalg.inv(diagonal)
    for start in range(0, n, SLAB):
        stop = min(start + SLAB, n)
        before = values[:, start:stop].clone()
        gradients = (weight - values) @ hessian[:, start:stop]
        for k in range(start, stop, block):
            here, i = slice(k, k + block), k // block
            moved = before[:, : k - start] - values[:, start:k]
            gradient = gradients[:, k - start : k - start + block] + moved @ hessian[start:k, here]
            new_codes, new = quantize(k, values[:, here] + gradient @ inverses[i])
            step = values[:, here] - new
            change = 2 * (step * gradient).sum(1) + ((step @ diagonal[i]) * step).sum(1)
            better = change < 0
            values[:, here] = torch.where(better[:, None], new, values[:, here])
            codes[:, i] = torch.where(_like(better, new_codes), new_codes, codes[:, i])
    return Rounded(values, codes)


def _like(rows: Tensor, codes: Tensor) -> Tensor:
    """A flag for each row in the shape of its codes, (rows,) or (rows, ...)."""
    return rows.view(-1, *[1] * (codes.dim() - 1))


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """The diagonal of E H E^T: what each row loses.  error: (rows, n)  ->  (rows,)"""
    return ((error @ hessian) * error).sum(1)


def proxy_loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T): the share of the output's energy that is lost.

    0 for a weight that puts nothing out.
    """
    lost = float(row_losses(weight - values, hessian).sum())
    energy = float(row_losses(weight, hessian).sum())
    return lost / energy if energy > 0 else 0.0
