"""Orthogonal transforms of any width that spread outliers: Hadamard transforms or similar ones.

For a width n = K * p with p a power of two, the transform is B = (M (x) I_p)(I_K (x) H_p): it views
a row as K x p, multiplies by the Sylvester matrix H_p along p and by an orthogonal matrix M along
K, and scales so that B @ B.T = I. M is a Hadamard matrix or a tensor product of Hadamard matrices
(Paley, Williamson); if there is none, it is the Hartley matrix; it can also be random. Matrices are
built when first used, cached in memory and never stored. M need not be symmetric, so B.T can differ
from B. Source: QuIP# (arXiv 2402.04396), section 3.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lowbit.kernels.hadamard import reference
from lowbit.kernels.hadamard.construct import construction
from lowbit.kernels.hadamard.factorization import Factorization, Kind, choose
from lowbit.kernels.hadamard.fast import orthogonal_op

__all__ = ["Kind", "Transform", "orthogonal"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Transform(Factorization):
    """An orthogonal transform B; made by `orthogonal`.

    n, kind and seed describe a transform t completely: orthogonal(t.n, t.kind, t.seed) == t.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies by B along the last dimension; computes in float32, in float64 for float64.

        x: (..., n) of float16, bfloat16, float32 or float64.

        Returns (..., n), same dtype, contiguous.
        """
        return orthogonal_op(self._checked(x), self.kind, self.seed, False)

    def inverse(self, x: Tensor) -> Tensor:
        """Multiplies by B.T along the last dimension, which undoes the transform: (..., n)."""
        return orthogonal_op(self._checked(x), self.kind, self.seed, True)

    def dense(self) -> Tensor:
        """Returns the matrix B, (n, n) float32. By definition, transform(x) = x @ B.T."""
        return reference.dense(self)

    def describe(self) -> str:
        """Returns the factors of B, outermost first, such as "172 Williamson x 64"."""
        names = [f"{k} {self._name(k)}" for k in self.orders]
        if self.power > 1 or not names:
            names.append(str(self.power))
        return " x ".join(names)

    def _name(self, order: int) -> str:
        if self.kind == "hadamard":
            return str(construction(order))
        return "Hartley" if self.kind == "hartley" else f"random (seed {self.seed})"

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.n:
            raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must be {self.n}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"x is {x.dtype}: allowed are {', '.join(map(str, _DTYPES))}")
        return x


def orthogonal(n: int, kind: str = "auto", seed: int = 0) -> Transform:
    """Returns the transform of a width.

    n: width, at least 1. If it is a power of two, the kind is always hadamard.
    kind: matrix that is used for the odd part of n.
        auto: a Hadamard matrix if one can be built, else hartley.
        hadamard: a Hadamard matrix; ValueError if none can be built.
        hartley: the Hartley matrix.
        random: a random orthogonal matrix; each seed costs a QR decomposition of that size.
    seed: seed of kind random; ignored for the others.
    """
    return Transform(**asdict(choose(n, kind, seed)))
