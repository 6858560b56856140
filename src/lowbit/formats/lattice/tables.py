"""Tables of all the words of E8P12, E8 and D4, which `codebooks.py` describes."""

from collections.abc import Callable
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.lattice import e8p


def e8_words() -> Tensor:
    """(256, 8) float32"""
    whole = [p for p in product((-1, 0, 1), repeat=8) if sum(map(abs, p)) in (0, 2)]
    halves = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    twos = [tuple(sign * (i == j) for j in range(8)) for i in range(8) for sign in (2, -2)]
    return _by_norm([*whole, *halves, *twos[:-1]])


def d4_words() -> Tensor:
    """(256, 4) float32"""
    grid = product((-2.5, -1.5, -0.5, 0.5, 1.5, 2.5), repeat=4)
    return _by_norm([p for p in grid if sum(p) % 2 == 0 and sum(v * v for v in p) <= 9])


def _by_norm(points: list) -> Tensor:
    return torch.tensor(sorted(points, key=lambda p: (sum(v * v for v in p), p))).float()


WORDS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "E8P12": (e8p.words, 8),
    "E8": (e8_words, 8),
    "D4": (d4_words, 4),
}


@lru_cache
def table(name: str, device: torch.device) -> Tensor:
    """All words of a codebook, on a device: (2**code_bits, dim) float32; never write to it."""
    words, _ = WORDS[name]
    with torch.inference_mode(False), torch.device("cpu"):
        return words().to(device)


# An op, so that torch.compile need not look inside and trace how a table is made.
@torch.library.custom_op("lowbit::look_up", mutates_args=())
def look_up(codes: Tensor, name: str) -> Tensor:
    """codes: (...) uint8, int32 or int64  ->  (..., dim) float32"""
    index = codes.int() if codes.dtype == torch.uint8 else codes
    return functional.embedding(index, table(name, codes.device))


@look_up.register_fake
def _(codes: Tensor, name: str) -> Tensor:
    return torch.empty((*codes.shape, WORDS[name][1]), dtype=torch.float32, device=codes.device)
