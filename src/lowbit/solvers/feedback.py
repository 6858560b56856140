"""Round a weight with error feedback: block LDLQ (GPTQ is its scalar case), and greedy passes.

The loss of a layer is tr((W - Q) H (W - Q)^T) with H = E[x x^T]. Columns are rounded block by
block, from the last to the first. The error of the columns that are done is fed into the target of
the next block. Source: QuIP (arXiv 2307.13304), section 3; QuIP# (arXiv 2402.04396), section 4.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.products import product

# Rounds a block of columns:
# (its first column, target (rows, block)) -> codes (rows, ...), values (rows, block)
Quantize = Callable[[int, Tensor], tuple[Tensor, Tensor]]

SLAB = 128  # number of columns whose feedback is computed by one matrix product
MOST_DAMPING = 10  # a Hessian that is not positive definite gets up to 10 times the damping


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    values: (rows, columns) float32, the rounded weight.
    codes: (rows, blocks, ...), the codes that the quantizer returned for each block.
    """

    values: Tensor
    codes: Tensor


def damped_factor(hessian: Tensor, damping: float, block: int) -> tuple[Tensor, Tensor] | None:
    """Damps and factors a Hessian: H = L D L^T.

    The Hessian is divided by its mean diagonal first. Damping is added up to ten times until the
    result is positive definite.

    hessian: (n, n) float32, n divisible by `block`.
    damping: the share of the mean diagonal that is added to the diagonal.
    block: the number of columns that are rounded together.

    Returns the damped H and L, both (n, n), L unit lower block triangular; None if the Hessian is
    not positive definite with ten times the damping.
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
    """Multiplies each panel of `block` columns by the inverse of its diagonal block."""
    n = len(lower)
    panels = lower.view(n, n // block, block)
    diagonal = torch.stack([lower[k : k + block, k : k + block] for k in range(0, n, block)])
    inverse = torch.linalg.inv(diagonal)
    return torch.einsum("npb,pbc->npc", panels, inverse).reshape(n, n)


def round_with_feedback(weight: Tensor, factor: Tensor, quantize: Quantize, block: int) -> Rounded:
    """Rounds a weight by block LDLQ: target_k = W_k + (W - Q)_{:, >k} L_{>k, k}.

    The feedback from finished slabs of SLAB columns is computed by one matrix product; n need not
    be divisible by SLAB.

    weight: (rows, n).
    factor: (n, n), L of `damped_factor`.
    quantize: rounds one block of columns; it is called from the last block to the first.
    block: the number of columns of a block.
    """
    rows, n = weight.shape
    error = torch.zeros_like(weight)
    values = torch.zeros_like(weight)
    codes: dict[int, Tensor] = {}
    for stop in range(n, 0, -SLAB):
        start = max(0, stop - SLAB)
        target = weight[:, start:stop] + product(error[:, stop:], factor[stop:, start:stop])
        for k in range(stop - block, start - 1, -block):
            here = slice(k, k + block)
            near = error[:, k + block : stop] @ factor[k + block : stop, here]
            codes[k], values[:, here] = quantize(k, target[:, k - start : k - start + block] + near)
            error[:, here] = weight[:, here] - values[:, here]
    return Rounded(values, torch.stack([codes[k] for k in sorted(codes)], 1))


def greedy_pass(
    weight: Tensor, hessian: Tensor, rounded: Rounded, quantize: Quantize, block: int
) -> Rounded:
    """Improves a rounded weight by one pass of coordinate descent over blocks of columns.

    For each block, the minimiser of the loss is rounded to the nearest codeword. A row takes the
    new codeword only if that lowers its loss: the nearest codeword need not be the best one in the
    metric of H. (A pass without this check doubled the loss on a spectrum k^-1.5.)

    weight: (rows, n), the weight before rounding.
    hessian: (n, n), the damped H of `damped_factor`.
    rounded: the result of `round_with_feedback` or of an earlier pass; it is not changed.
    quantize, block: as in `round_with_feedback`.
    """
    values, codes = rounded.values.clone(), rounded.codes.clone()
    n = weight.shape[1]
    diagonal = torch.stack([hessian[k : k + block, k : k + block] for k in range(0, n, block)])
    inverses = torch.linalg.inv(diagonal)
    for start in range(0, n, SLAB):
        stop = min(start + SLAB, n)
        before = values[:, start:stop].clone()
        gradients = product(weight - values, hessian[:, start:stop])
        for k in range(start, stop, block):
            here, i = slice(k, k + block), k // block
            moved = before[:, : k - start] - values[:, start:k]
            gradient = gradients[:, k - start : k - start + block] + moved @ hessian[start:k, here]
            new_codes, new = quantize(k, values[:, here] + gradient @ inverses[i])
            step = values[:, here] - new
            change = 2 * (step * gradient).sum(1) + ((step @ diagonal[i]) * step).sum(1)
            better = change < 0
            values[:, here] = torch.where(better[:, None], new, values[:, here])
            codes[:, i] = torch.where(_expanded(better, new_codes), new_codes, codes[:, i])
    return Rounded(values, codes)


def _expanded(rows: Tensor, codes: Tensor) -> Tensor:
    """Returns flags (rows,) in a shape that broadcasts against codes (rows, ...)."""
    return rows.view(-1, *[1] * (codes.dim() - 1))


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """Returns the loss of each row, the diagonal of E H E^T: (rows,).

    error: (rows, n), the difference E of weight and rounded weight.
    """
    return (product(error, hessian) * error).sum(1)


def proxy_loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """Returns the share of the output's energy that is lost, or 0 if the output is always 0.

    It is tr((W - Q) H (W - Q)^T) / tr(W H W^T).

    weight, values: (rows, n), W and the rounded weight Q.
    hessian: (n, n).
    """
    lost = float(row_losses(weight - values, hessian).sum())
    energy = float(row_losses(weight, hessian).sum())
    return lost / energy if energy > 0 else 0.0
