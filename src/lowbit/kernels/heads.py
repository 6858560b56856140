"""Rotates the heads of queries, keys and values before they are rounded.

A head h becomes B.T S h, with the signs S of a seed and the transform B that
`lowbit.kernels.hadamard.orthogonal` chooses for its width. Products of queries with keys stay as
they are. Source: QuaRot (arXiv 2404.00456), section 4.
"""

from torch import Tensor

from lowbit.kernels import hadamard
from lowbit.kernels.signs import signs_for


def rotate_heads(x: Tensor, seed: int) -> Tensor:
    """Rotates each vector of the last dimension: (..., width), same dtype."""
    return hadamard.orthogonal(x.shape[-1]).inverse(x * signs_for(x, seed))


def restore_heads(x: Tensor, seed: int) -> Tensor:
    """Undoes `rotate_heads`: (..., width), same dtype."""
    return hadamard.orthogonal(x.shape[-1])(x) * signs_for(x, seed)
