"""Undoes the rotation of the formats lattice, trellis and uniform: signs and orthogonal matrices.

Transforms of the kind "random" and Hadamard matrices of orders above 256 are left out; the second
are tensor products, which `lowbit.kernels.hadamard.factorization` chooses.
"""

import hashlib

import numpy as np

WILLIAMSON = {  # signs of the entries 1 to (w - 1) / 2 of four symmetric circulants
    23: ("++-++--+-+-", "+-++--+++--", "+++--+-+-++", "-+++-----+-"),
    29: ("+++---+++-+--+", "+-+++---+--+-+", "++++++---+-++-", "-+-++---+--+-+"),
    43: ("++---++", "+-++-+-", "++-++--", "-+-+-+-"),  # of the entries in ORBITS
}
ORBITS = (1, 2, 3, 4, 5, 9, 10)  # the others follow by multiplication with 6, 36 and -1


def restored(rotated: np.ndarray, entry: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Returns S_out B_out rotated B_in.T S_in, for the keys of an entry, float32."""
    for side, width in (("in", entry["shape"][1]), ("out", entry["shape"][0])):
        kind, seed = entry[f"transform_{side}"], entry[f"seed_{side}"]
        matrix = transform(width, kind, tensors.get(f"factor_{side}"))
        stored = tensors.get(f"sign_{side}")
        signs = drawn_signs(width, seed) if stored is None else stored.astype(float)
        rotated = (rotated @ matrix.T * signs).T  # the other side comes next
    return rotated.astype(np.float32)


def drawn_signs(width: int, seed: int | None) -> np.ndarray:
    """Returns the signs of a seed: (width,) of 1 and -1; None: there are none."""
    if seed is None:
        return np.ones(width)
    digest = hashlib.shake_256(f"lowbit signs {seed}".encode()).digest(-(-width // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=width, bitorder="little")
    return 1 - 2.0 * bits


def transform(width: int, kind: str, factor: np.ndarray | None = None) -> np.ndarray:
    """Returns the orthogonal matrix B of a width: (width, width)."""
    odd = width // (width & -width)
    if factor is not None:  # float16 or float32: M is stored
        outer, power = factor.astype(float), width // odd
    elif odd == 1:
        outer, power = np.ones((1, 1)), width
    elif kind == "hartley":
        angle = 2 * np.pi * (np.outer(range(odd), range(odd)) % odd) / odd
        outer, power = (np.cos(angle) + np.sin(angle)) / odd**0.5, width // odd
    else:
        orders = (odd << j for j in range(2, (width // odd).bit_length()))
        order = next(k for k in orders if k <= 256 and hadamard(k) is not None)
        outer, power = hadamard(order) / order**0.5, width // order
    return np.kron(outer, sylvester(power) / power**0.5)


def sylvester(order: int) -> np.ndarray:
    """Returns the Hadamard matrix of a power of two."""
    made = np.ones((1, 1))
    while len(made) < order:
        made = np.kron([[1, 1], [1, -1]], made)
    return made


def hadamard(order: int) -> np.ndarray | None:
    """Returns the Hadamard matrix of an order that is four times some number, if there is one."""
    eye = np.eye(order)
    if prime_of(order - 1):
        return eye + bordered(order - 1, -1)
    if order % 8 == 4 and prime_of(order // 2 - 1):
        first = np.kron(bordered(order // 2 - 1, 1), [[1, 1], [1, -1]])
        return first + np.kron(np.eye(order // 2), [[1, -1], [-1, -1]])
    if order // 4 not in WILLIAMSON:
        return None
    w = order // 4
    rows = np.ones((4, w))
    for row, signs in zip(rows, WILLIAMSON[w], strict=True):
        for at, sign in enumerate(signs):
            for place in [ORBITS[at] * r % w for r in (1, 6, 36)] if w == 43 else [at + 1]:
                row[place] = row[-place] = 1 if sign == "+" else -1
    a, b, c, d = rows[:, (np.arange(w) - np.arange(w)[:, None]) % w]
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def prime_of(q: int) -> int | None:
    """Returns p if q is a power of the prime p."""
    p = next((d for d in range(2, q + 1) if q % d == 0), 0)
    while p and q % p == 0:
        q //= p
    return p if q == 1 else None


def bordered(q: int, left: int) -> np.ndarray:
    """Returns [[0, 1], [left, Q]], where Q[a, b] says whether a - b is a square in GF(q)."""
    p = prime_of(q)
    assert p is not None
    k = round(np.log(q) / np.log(p))
    digits = np.arange(q)[:, None] // p ** np.arange(k) % p
    powers = next(found for low in digits[1:] if len(found := powers_of(low, p)) == q - 1)
    square = np.zeros(q)
    square[powers[::2]], square[powers[1::2]] = 1, -1
    made = np.zeros((q + 1, q + 1))
    made[0, 1:], made[1:, 0] = 1, left
    made[1:, 1:] = square[(digits[:, None] - digits) % p @ p ** np.arange(k)]
    return made


def powers_of(low: np.ndarray, p: int) -> list[int]:
    """Returns the powers of x modulo x^k + (the polynomial with the coefficients `low`)."""
    k, powers = len(low), list[int]()
    one = np.eye(1, k, dtype=int)[0]
    value = one
    while low[0]:
        powers.append(int(value @ p ** np.arange(k)))
        value = (np.concatenate([[0], value[:-1]]) - value[-1] * low) % p
        if (value == one).all():
            break
    return powers
