"""Builds Hadamard matrices H: entries are 1 and -1, and H @ H.T == order * I, which is checked.

Quantized models store the order and not the matrix. Therefore no entry of a matrix built here may
ever change, not even in sign (a test compares hashes).

- Sylvester: powers of two, in natural order (H[a, b] = -1 to the number of common bits of a and b).
- R. E. A. C. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933), constructions I and II.
- J. Williamson, Hadamard's determinant theorem and the sum of four squares, Duke 11 (1944).
"""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lowbit.kernels.hadamard.fields import field, prime_power

Construction = Literal["Sylvester", "Paley I", "Paley II", "Williamson"]

# First rows of symmetric circulants A, B, C, D with A² + B² + C² + D² = 4wI, found by search.
# Listed are the signs of entries 1 to (w - 1) / 2; entry 0 is +, and the others mirror these.
_WILLIAMSON = {
    23: ("++-++--+-+-", "+-++--+++--", "+++--+-+-++", "-+++-----+-"),
    29: ("+++---+++-+--+", "+-+++---+--+-+", "++++++---+-++-", "-+-++---+--+-+"),
    # constant on the orbits of multiplication by 1, 6, 36 and -1: the signs of 1, 2, 3, 4, 5, 9, 10
    43: ("++---++", "+-++-+-", "++-++--", "-+-+-+-"),
}
_ORBITS_OF_43 = (1, 2, 3, 4, 5, 9, 10)


def construction(order: int) -> Construction | None:
    """Returns how the matrix of an order is built; None if it cannot be built here."""
    if order >= 1 and order & (order - 1) == 0:
        return "Sylvester"
    if order % 4:
        return None
    if prime_power(order - 1):  # order - 1 is 3 modulo 4
        return "Paley I"
    if order % 8 == 4 and prime_power(order // 2 - 1):  # order / 2 - 1 is 1 modulo 4
        return "Paley II"
    return "Williamson" if order // 4 in _WILLIAMSON else None


@lru_cache(maxsize=32)
def hadamard(order: int) -> Tensor:
    """Builds the matrix of an order: (order, order) int8 of 1 and -1; do not modify the result.

    Raises ValueError if no construction for this order is implemented.
    """
    how = construction(order)
    if how is None:
        raise ValueError(f"order is {order}: no construction for it is implemented")
    if how == "Sylvester":
        matrix = _sylvester(order)
    elif how == "Paley I":
        matrix = _paley_one(order - 1)
    elif how == "Paley II":
        matrix = _paley_two(order // 2 - 1)
    else:
        matrix = _williamson(order // 4)
    product = matrix.float() @ matrix.float().T  # exact: integers far below 2**24
    assert torch.equal(product, order * _eye(order).float()), f"order {order} is not Hadamard"
    return matrix


def williamson_rows(w: int) -> Tensor:
    """Returns the first rows of the four circulants for order 4w: (4, w) int8 of 1 and -1."""
    rows = torch.ones(4, w, dtype=torch.int8, device="cpu")
    for row, signs in zip(rows, _WILLIAMSON[w], strict=True):
        for at, sign in enumerate(signs):
            orbit = [_ORBITS_OF_43[at] * r % w for r in (1, 6, 36)] if w == 43 else [at + 1]
            for position in orbit:
                row[position] = row[-position] = 1 if sign == "+" else -1
    return rows


def _sylvester(order: int) -> Tensor:
    matrix = _eye(1)
    while len(matrix) < order:
        matrix = torch.kron(_signs([[1, 1], [1, -1]]), matrix)
    return matrix


def _paley_one(q: int) -> Tensor:
    """Returns I + [[0, 1], [-1, Q]], for q = 3 modulo 4: (q + 1, q + 1)."""
    return _eye(q + 1) + _bordered(q, -1)


def _paley_two(q: int) -> Tensor:
    """Returns C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] with C = [[0, 1], [1, Q]].

    q must be 1 modulo 4; the result is (2q + 2, 2q + 2).
    """
    one = torch.kron(_bordered(q, 1), _signs([[1, 1], [1, -1]]))
    return one + torch.kron(_eye(q + 1), _signs([[1, -1], [-1, -1]]))


def _williamson(w: int) -> Tensor:
    index = torch.arange(w, device="cpu")
    a, b, c, d = williamson_rows(w)[:, (index - index[:, None]) % w]
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _bordered(q: int, left: int) -> Tensor:
    """Returns [[0, 1], [left, Q]], Q[a, b] the quadratic character of a - b: (q + 1, q + 1)."""
    elements = torch.arange(q, device="cpu")
    core = field(q).character()[field(q).subtract(elements[:, None], elements)]
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.int8, device="cpu")
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, left, core
    return matrix


def _signs(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8, device="cpu")


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.int8, device="cpu")
