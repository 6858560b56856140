"""The words of the codebooks of the format lattice, in the order of their codes."""

from itertools import product

import numpy as np

HALVES = """012 013 014 023 045 046 047 056 057 067 123 146 147 156 157
167 237 245 246 247 256 257 267 345 346 347 356 357 367"""  # places of 1/2 in norm 12


def e8p() -> np.ndarray:
    """Returns the words of E8P12: (65536, 8)."""
    ball = {p for p in product(range(3), repeat=8) if sum((1, 9, 25)[k] for k in p) <= 40}
    more = {tuple(int(str(i) not in halves) for i in range(8)) for halves in HALVES.split()}
    code = np.arange(2**16)
    level = np.array(sorted(ball | more))[code >> 8]
    minus = code[:, None] >> np.arange(7) & 1
    last = (minus.sum(1) + level.sum(1)) % 2
    signs = 1 - 2 * np.column_stack([minus, last])
    return (level + 0.5) * signs + (0.25 - 0.5 * (code >> 7 & 1))[:, None]


def by_norm(points: list) -> np.ndarray:
    return np.array(sorted(points, key=lambda p: (sum(v * v for v in p), p)), float)


def e8() -> np.ndarray:
    """Returns the 256 words of the second stage of E8P12RVQ3B: (256, 8)."""
    whole = [p for p in product((-1, 0, 1), repeat=8) if sum(map(abs, p)) in (0, 2)]
    halves = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    twos = [tuple(sign * (i == j) for j in range(8)) for i in range(8) for sign in (2, -2)]
    return by_norm([*whole, *halves, *twos[:-1]])


def d4() -> np.ndarray:
    """Returns the words of D4: (256, 4)."""
    grid = product((-2.5, -1.5, -0.5, 0.5, 1.5, 2.5), repeat=4)
    return by_norm([p for p in grid if sum(p) % 2 == 0 and sum(v * v for v in p) <= 9])


def words(codes: np.ndarray, name: str, residual_scale: float | None) -> np.ndarray:
    """Returns the words of codes: (...) -> (..., dim)."""
    if name == "HI":
        return codes[..., None] - 7.5
    if name == "D4":
        return d4()[codes]
    first = e8p()[codes & 0xFFFF]
    if name == "E8P12":
        return first
    second = {"E8P12RVQ3B": e8, "E8P12RVQ4B": e8p}[name]()
    return first + np.float32(residual_scale) * second[codes >> 16]
