"""Finite fields GF(p^k), as Paley's constructions of Hadamard matrices need them.

An element is an integer from 0 to q - 1. Its base-p digits, lowest first, are the coefficients of a
polynomial over GF(p). Products are taken modulo a monic polynomial of degree k whose root generates
all nonzero elements. Among these polynomials it is the first, sorted by the integer whose digits
are its other coefficients. So the numbering of the elements is fixed, and so is every matrix built
from them.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def prime_power(q: int) -> tuple[int, int] | None:
    """Returns the prime p and the exponent k with q = p**k; None if q is not a prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 1
    while p**k < q:
        k += 1
    return (p, k) if p**k == q else None


@dataclass(frozen=True)
class Field:
    """The field GF(p^k). Its methods take and return int64 tensors of elements."""

    p: int
    k: int
    powers: tuple[int, ...]  # powers 0 to q - 2 of the generator: every nonzero element once

    @property
    def size(self) -> int:
        return self.p**self.k

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._number(self._digits(a) + self._digits(b))

    def subtract(self, a: Tensor, b: Tensor) -> Tensor:
        return self._number(self._digits(a) - self._digits(b))

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        powers = torch.tensor(self.powers, device="cpu")
        logarithm = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        logarithm[powers] = torch.arange(self.size - 1, device="cpu")
        product = powers[(logarithm[a] + logarithm[b]) % (self.size - 1)]
        return torch.where((a == 0) | (b == 0), 0, product)

    def character(self) -> Tensor:
        """Returns the quadratic character of all elements: (q,) int8, for odd q.

        It is 1 for squares, -1 for other elements and 0 for 0. The squares are the even powers of
        the generator.
        """
        character = torch.zeros(self.size, dtype=torch.int8, device="cpu")
        powers = torch.tensor(self.powers, device="cpu")
        character[powers[::2]] = 1
        character[powers[1::2]] = -1
        return character

    def _digits(self, a: Tensor) -> Tensor:
        return a[..., None] // self._weights() % self.p

    def _number(self, digits: Tensor) -> Tensor:
        return (digits % self.p * self._weights()).sum(-1)

    def _weights(self) -> Tensor:
        return torch.tensor([self.p**i for i in range(self.k)], device="cpu")


@lru_cache(maxsize=64)
def field(q: int) -> Field:
    """Returns the field of q elements. Raises ValueError if q is not a prime power."""
    factors = prime_power(q)
    if factors is None:
        raise ValueError(f"q is {q}: allowed is a power of a prime")
    p, k = factors
    for candidate in range(1, q):
        powers = _powers(p, k, [candidate // p**i % p for i in range(k)])
        if len(powers) == q - 1:
            return Field(p, k, tuple(powers))
    raise AssertionError(f"GF({q}) has a generator")


def _powers(p: int, k: int, low: list[int]) -> list[int]:
    """Returns the distinct powers of x modulo x^k + (the polynomial of coefficients `low`).

    If low[0] is not 0, no power is 0, and the powers form a cycle. If there are q - 1 powers, they
    are all nonzero elements, and every nonzero element has an inverse.
    """
    one = [1] + [0] * (k - 1)
    value, powers = one, []
    while low[0]:
        powers.append(sum(digit * p**i for i, digit in enumerate(value)))
        top = value[-1]
        shifted = [0, *value[:-1]]
        value = [(digit - top * c) % p for digit, c in zip(shifted, low, strict=True)]
        if value == one:
            break
    return powers
