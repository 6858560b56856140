"""Tables of all the words of E8P12, E8 and D4, which `codebooks.py` describes."""

from collections.abc import Callable
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from lowbit.formats.lattice import e8p


def e8_words() -> Tensor:
    """Returns the words of E8: (256, 8) float32."""
    whole = [p for p in product((-1, 0, 1), repeat=8) if sum(map(abs, p)) in (0, 2)]
    halves = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    twos = [tuple(sign * (i == j) for j in range(8)) for i in range(8) for sign in (2, -2)]
    return _by_norm([*whole, *halves, *twos[:-1]])


def d4_words() -> Tensor:
    """Returns the words of D4: (256, 4) float32."""
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
    """Returns all words of a codebook: (2**code_bits, dim) float32; do not modify the result."""
    words, _ = WORDS[name]
    with torch.inference_mode(False), torch.device("cpu"):
        return words().to(device)


@lru_cache
def _quarters(name: str, device: torch.device) -> Tensor:
    """Returns each word as one integer, whose bytes are four times the coordinates."""
    whole = (4 * table(name, torch.device("cpu"))).to(torch.int8)
    return whole.view({8: torch.int64, 4: torch.int32}[whole.shape[1]]).flatten().to(device)


def look_up(codes: Tensor, name: str) -> Tensor:
    """Returns four times the words of codes, which are integers.

    Gathering one integer for each word takes a third of the time of gathering its floats.

    codes: (...) uint8, int32 or int64.

    Returns (..., dim) int8.
    """
    # The custom op keeps torch.compile from tracing how a table is made. A call of it costs 0.2 ms
    # outside of a compiled graph.
    return _op(codes, name) if torch.compiler.is_compiling() else _look_up(codes, name)


def _look_up(codes: Tensor, name: str) -> Tensor:
    index = (codes.int() if codes.dtype == torch.uint8 else codes).reshape(-1)
    words = _quarters(name, codes.device).index_select(0, index)
    return words.view(torch.int8).view(*codes.shape, WORDS[name][1])


_op = torch.library.custom_op("lowbit::look_up", _look_up, mutates_args=())


@_op.register_fake
def _(codes: Tensor, name: str) -> Tensor:
    return torch.empty((*codes.shape, WORDS[name][1]), dtype=torch.int8, device=codes.device)
