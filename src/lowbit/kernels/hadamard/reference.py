"""The reference of the transform: its definition as a dense matrix."""

from functools import reduce

import torch
from torch import Tensor

from lowbit.kernels.hadamard.construct import hadamard
from lowbit.kernels.hadamard.factorization import Factorization
from lowbit.kernels.hadamard.haar import haar
from lowbit.kernels.hadamard.hartley import hartley


def factors(factorization: Factorization) -> list[Tensor]:
    """Returns the matrices whose tensor product is M, outermost first: (k, k) float64 each.

    Hadamard matrices have entries 1 and -1, and `scale` makes them orthogonal; the others are
    orthogonal already.
    """
    if factorization.kind == "hadamard":
        return [hadamard(order).double() for order in factorization.orders]
    if factorization.kind == "hartley":
        return [hartley(order) for order in factorization.orders]
    return [haar(order, factorization.seed) for order in factorization.orders]


def dense(factorization: Factorization, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns B = M (x) H_p, scaled to be orthogonal, each entry rounded once: (n, n)."""
    outer = reduce(
        torch.kron, factors(factorization), torch.ones(1, 1, dtype=torch.float64, device="cpu")
    )
    doublings = [hadamard(2).to(dtype)] * (factorization.power.bit_length() - 1)
    return reduce(torch.kron, doublings, (outer * factorization.scale).to(dtype))
