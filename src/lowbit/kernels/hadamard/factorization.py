"""Chooses the orthogonal matrix of a width n = K * p, with p a power of two: K and its matrices.

Quantized models store a width, a kind and a seed only. The choice made here is therefore part of
the format: another choice, even a better one, must become a new kind.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from lowbit.kernels.hadamard.construct import construction

Kind = Literal["hadamard", "hartley", "random"]

_DIRECT = 256  # up to this order, one Hadamard matrix is used; above, tensor products are tried too
_LARGEST = 1024  # largest order of a matrix: each value costs as many products as the order
# One more pass over the data costs as much as this many products per value (AVX-512, one thread:
# 0.75 ns per value for the pass, 0.02 ns for each product).
_PASS = 32


@dataclass(frozen=True)
class Factorization:
    """The factors of B = (M (x) I_p)(I_K (x) H_p), with M a tensor product of matrices.

    n: width, K * p.
    kind: kind of the matrices of M.
    seed: seed of a random M, else 0.
    orders: orders of the matrices of M; their product is K; outermost first, largest first.
    power: p.
    """

    n: int
    kind: Kind
    seed: int
    orders: tuple[int, ...]
    power: int

    @property
    def scale(self) -> float:
        """The factor that makes the product of all matrices of 1 and -1 orthogonal."""
        return 1 / math.sqrt(self.n if self.kind == "hadamard" else self.power)


@lru_cache(maxsize=4096)
def choose(n: int, kind: str, seed: int) -> Factorization:
    """Chooses the factors of a width.

    n: width, at least 1.
    kind: one of Kind, or auto: hadamard if such a matrix can be built, else hartley.
    seed: seed of kind random.

    Raises ValueError for another kind or width, and for hadamard if no such matrix can be built.
    """
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
        raise ValueError(
            f"n is {n}: no Hadamard matrix of this width can be built; kind auto takes hartley"
        )
    return Factorization(n, "hartley", 0, (odd,), 1 << twos)


def hadamard_orders(odd: int, twos: int) -> tuple[int, ...] | None:
    """Returns orders of matrices whose tensor product has order odd * 2**j, j <= twos, if any.

    This is one matrix up to order _DIRECT; above, it is the cheapest tensor product (which can also
    be one matrix).
    """
    single = _order(odd, twos)
    if single is not None and single <= _DIRECT:
        return (single,)
    best = None
    # Every order has a factor of 4 at least, and no order is above _LARGEST.
    for parts in _factorizations(odd, min(odd, _LARGEST // 4)):
        orders = tuple(sorted((_order(part, twos) or 0 for part in parts), reverse=True))
        power = math.prod(orders) // odd
        if all(orders) and power <= 1 << twos:
            candidate = (sum(orders) + _PASS * len(orders), orders)
            best = min(best, candidate) if best else candidate
    return best[1] if best else None


def _order(odd: int, twos: int) -> int | None:
    """Returns the smallest order odd * 2**j, 2 <= j <= twos, that has a construction; else None."""
    orders = (odd << j for j in range(2, twos + 1))
    return next((k for k in orders if k <= _LARGEST and construction(k)), None)


def _factorizations(number: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Yields all factorizations of an odd number into factors above 1, in descending order."""
    if number == 1:
        yield ()
    for factor in range(3, min(number, largest) + 1, 2):
        if number % factor == 0:
            for rest in _factorizations(number // factor, factor):
                yield (factor, *rest)
