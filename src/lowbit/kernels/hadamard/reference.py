"""The definition of the transform: a dense matrix."""

from functools import reduce

import torch
from torch import Tensor

from lowbit.kernels.hadamard.construct import hadamard
from lowbit.kernels.hadamard.haar import haar
from lowbit.kernels.hadamard.hartley import hartley
from lowbit.kernels.hadamard.plan import Plan


def factors(plan: Plan) -> list[Tensor]:
    """The matrices whose tensor product is M, outermost first.  ->  (k, k) float64 each

    Entries 1 and -1 where the kind is hadamard (plan.scale holds their norm), else orthogonal.
    """
    if plan.kind == "hadamard":
        return [hadamard(order).double() for order in plan.orders]
    if plan.kind == "hartley":
        return [hartley(order) for order in plan.orders]
    return [haar(order, plan.seed) for order in plan.orders]


def dense(plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    """B = M (x) H_p, scaled to be orthogonal, each entry rounded once.  ->  (n, n)"""
    outer = reduce(torch.kron, factors(plan), torch.ones(1, 1, dtype=torch.float64, device="cpu"))
    doublings = [hadamard(2).to(dtype)] * (plan.power.bit_length() - 1)
    return reduce(torch.kron, doublings, (outer * plan.scale).to(dtype))
