"""Orthogonal transforms of any width that spread outliers: Hadamard, or as near as there is.

For a width n = K * p with p a power of two, B = (M (x) I_p)(I_K (x) H_p): view a row as K x p,
multiply by the Sylvester matrix H_p along p and by an orthogonal M along K, scaled so that
B @ B.T = I. M is a Hadamard matrix or a tensor product of some (Paley, Williamson), else the
Hartley matrix, or random orthogonal. Built when first used, kept in memory, never stored. M need
not be symmetric: B.T is not B. (QuIP#, arXiv 2402.04396, section 3.)
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
    """Made by `orthogonal`; orthogonal(t.n, t.kind, t.seed) == t, so these three describe it."""

    def __call__(self, x: Tensor) -> Tensor:
        """B along the last dimension, in float32 or better.

        x: (..., n) float16, bfloat16, float32 or float64  ->  (..., n), same dtype, contiguous
        """
        return orthogonal_op(self._checked(x), self.kind, self.seed, False)

    def inverse(self, x: Tensor) -> Tensor:
        """B.T along the last dimension: undoes the transform.  x: (..., n)  ->  (..., n)"""
        return orthogonal_op(self._checked(x), self.kind, self.seed, True)

    def dense(self) -> Tensor:
        """B itself, the definition: transform(x) = x @ B.T.  ->  (n, n) float32"""
        return reference.dense(self)

    def describe(self) -> str:
        """How B is made, outermost factor first: "172 Williamson x 64"."""
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
    """The transform of width n >= 1.

    kind: auto takes a Hadamard matrix where one can be built, else hartley; hadamard refuses other
    widths; hartley and random (which alone looks at the seed, and costs a QR of the odd part of n
    for each seed) name what stands for the odd part. A power of two is hadamard in every case.
    """
    return Transform(**asdict(choose(n, kind, seed)))
