"""Which orthogonal matrix a width gets: n = K * p with p a power of two, and what stands for K.

Quantized models store a width, a kind and a seed. The choice made here is therefore part of the
format: a different one, even a better one, must be a new kind.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from lowbit.kernels.hadamard.construct import construction

Kind = Literal["hadamard", "hartley", "random"]

_DIRECT = 256  # up to this order, one Hadamard matrix; above, tensor products are tried as well
_LARGEST = 1024  # and none above this one: each value costs that many products
# One more pass over the data costs as much as this many products a value (AVX-512, one thread:
# 0.75 ns a value for the pass, 0.02 ns for each product)
_PASS = 32


@dataclass(frozen=True)
class Factorization:
    """B = (M (x) I_p)(I_K (x) H_p), M the tensor product of the matrices that `orders` names."""

    n: int
    kind: Kind
    seed: int  # of M where it is random, else 0
    orders: tuple[int, ...]  # product K; outermost first, largest first
    power: int  # p

    @property
    def scale(self) -> float:
        """What the matrices of 1 and -1 are multiplied with, all together."""
        return 1 / math.sqrt(self.n if self.kind == "hadamard" else self.power)


@lru_cache(maxsize=4096)
def choose(n: int, kind: str, seed: int) -> Factorization:
    """kind: one of Kind, or auto: hadamard where there is one, else hartley."""
    if n < 1:
        raise ValueError(f"n is {n}: allowed is 1 and above")
    if kind not in ("auto", *get_args(Kind)):
        raise ValueError(f"kind is {kind!r}: allowed are auto, {', '.join(get_args(Kind))}")
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    if odd == 1:
        return Factorization(n, "hadamard", 0, (), n)
    if kind == "random":
        return Factorization(n, "random", seed, (odd,), 1 << twos)
    orders = None if kind == "hartley" else hadamard_orders(odd, twos)
    if orders is not None:
        return Factorization(n, "hadamard", 0, orders, n // math.prod(orders))
    if kind == "hadamard":
        raise ValueError(f"n is {n}: no Hadamard matrix is known here; kind auto takes hartley")
    return Factorization(n, "hartley", 0, (odd,), 1 << twos)


def hadamard_orders(odd: int, twos: int) -> tuple[int, ...] | None:
    """Orders of matrices whose tensor product has order odd * 2**j, j <= twos, if there are any.

    One matrix up to _DIRECT; above, the cheapest tensor product (one matrix is one as well).
    """
    single = _order(odd, twos)
    if single is not None and single <= _DIRECT:
        return (single,)
    best = None
    # Every factor takes two twos at least, and no order is above _LARGEST.
    for parts in _factorizations(odd, min(odd, _LARGEST // 4)):
        orders = tuple(sorted((_order(part, twos) or 0 for part in parts), reverse=True))
        spent = math.prod(orders) // odd
        if all(orders) and spent <= 1 << twos:
            offer = (sum(orders) + _PASS * len(orders), orders)
            best = min(best, offer) if best else offer
    return best[1] if best else None


def _order(odd: int, twos: int) -> int | None:
    """The smallest order odd * 2**j, 2 <= j <= twos, that is built without a tensor product."""
    orders = (odd << j for j in range(2, twos + 1))
    return next((k for k in orders if k <= _LARGEST and construction(k)), None)


def _factorizations(number: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Every way to write an odd number as a product of factors above 1, in descending order."""
    if number == 1:
        yield ()
    for factor in range(3, min(number, largest) + 1, 2):
        if number % factor == 0:
            for rest in _factorizations(number // factor, factor):
                yield (factor, *rest)
