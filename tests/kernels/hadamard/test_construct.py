import hashlib

import pytest
import torch

from lowbit.kernels.hadamard.construct import construction, hadamard, williamson_rows

PALEY_ONE = [12, 20, 28, 44, 60, 68, 84, 108, 132, 140, 180, 244, 284, 684, 344]
PALEY_TWO = [36, 52, 76, 100, 124, 148, 196, 540, 924]
WILLIAMSON = [92, 116, 172]
SYLVESTER = [1, 2, 4, 8, 64, 256]
HOW = {
    **dict.fromkeys(SYLVESTER, "Sylvester"),
    **dict.fromkeys(PALEY_ONE, "Paley I"),
    **dict.fromkeys(PALEY_TWO, "Paley II"),
    **dict.fromkeys(WILLIAMSON, "Williamson"),
}
DIGESTS = {
    16: "2001d29ac481e655",
    12: "6e3ec5c5530c2de6",
    28: "19f4be5b614fc63c",
    244: "4263ffda284ef3a4",
    344: "8a8c71ed08a2d447",
    36: "41a3f7927fa274b5",
    52: "a7fe3d20f0c6869e",
    100: "3c3693f964613511",
    92: "1141a759144cb3da",
    116: "701eb915478c019a",
    172: "9c9d76558de4f17e",
}


@pytest.mark.parametrize("order", HOW)
def test_rows_are_orthogonal_in_integers(order: int) -> None:
    assert construction(order) == HOW[order]
    matrix = hadamard(order)
    assert matrix.dtype == torch.int8 and set(matrix.unique().tolist()) <= {1, -1}
    exact = matrix.double()
    assert torch.equal(exact @ exact.T, order * torch.eye(order, dtype=torch.float64))


def test_sylvester_is_in_natural_order() -> None:
    signs = [[(-1) ** (a & b).bit_count() for b in range(16)] for a in range(16)]
    assert hadamard(16).tolist() == signs


@pytest.mark.parametrize("w", [23, 29, 43])
def test_williamson_rows(w: int) -> None:
    rows = williamson_rows(w).double()
    assert torch.equal(rows[:, 1:], rows[:, 1:].flip(1)) and torch.equal(rows[:, 0], torch.ones(4))
    index = torch.arange(w)
    circulants = rows[:, (index - index[:, None]) % w]
    squares = (circulants @ circulants).sum(0)
    assert torch.equal(squares, 4 * w * torch.eye(w, dtype=torch.float64))


def test_paley_symmetry() -> None:
    for order in (12, 28, 44):  # I + S, S skew: these are the matrices whose transpose differs
        skew = hadamard(order) - torch.eye(order, dtype=torch.int8)
        assert torch.equal(skew, -skew.T)
    for order in (36, 52, 100):
        assert torch.equal(hadamard(order), hadamard(order).T)


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 10, 156, 188, 428])
def test_no_construction(order: int) -> None:
    assert construction(order) is None
    with pytest.raises(ValueError, match=f"order is {order}: no construction"):
        hadamard(order)


def test_matrices_never_change() -> None:
    """Models on disk depend on every sign: never edit these, add a new kind instead."""
    assert {order: digest(order) for order in DIGESTS} == DIGESTS


def digest(order: int) -> str:
    return hashlib.sha256(bytes((hadamard(order) > 0).flatten().tolist())).hexdigest()[:16]
