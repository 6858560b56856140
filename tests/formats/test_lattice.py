import hashlib
import itertools
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import lowbit.formats.lattice
from lowbit.formats import build, link
from lowbit.formats.lattice import LatticeLinear, e8p, reference, search, tensor_bytes
from lowbit.formats.lattice.codebooks import CODEBOOKS, E8, Codebook, Residual, codebook
from lowbit.formats.lattice.incoherence import (
    restore_weight,
    rotate_hessian,
    rotate_weight,
    rotation,
)
from lowbit.formats.lattice.tables import WORDS
from lowbit.kernels.hadamard import orthogonal

ENTRY: dict[str, Any] = {
    "format": "lattice",
    "shape": [12, 40],
    "bias": "float16",
    "codebook": "E8P12RVQ4B",
    "residual_scale": 0.25,
    "scale": "row",
    "scale_dtype": "float16",
    "seed_in": 5,
    "seed_out": 6,
    "transform_in": "hadamard",
    "transform_out": "hadamard",
    "signs": "seed",
    "shares": None,
}
# (out, in) and the kinds of their transforms: Sylvester, Paley, Williamson, Hartley, random.
WIDTHS = [
    (16, 64, "auto"),
    (12, 40, "auto"),
    (92, 20, "auto"),
    (8, 344, "auto"),
    (7, 33, "auto"),
    (9, 13, "random"),
    (1, 1, "auto"),
]
every_book = pytest.mark.parametrize("book", CODEBOOKS.values(), ids=CODEBOOKS)
either_path = pytest.mark.parametrize("most_rotated", [0.0, 1e9], ids=["restored", "rotated"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(book: Codebook, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**book.code_bits, shape, generator=generator)
    return codes.to(book.code_dtype)


def made(
    rows: int, columns: int, book: Codebook, kind: str = "auto", by_row: bool = False, **more: Any
) -> LatticeLinear:
    """A layer of random codes."""
    codes = random_codes(book, rows, book.blocks(columns), seed=rows + columns)
    scale = torch.rand(rows if by_row else 1, generator=torch.Generator().manual_seed(1)) + 0.1
    sides = rotation(columns, 5, kind), rotation(rows, 6, kind)
    return LatticeLinear.from_codes(codes, scale, *sides, codebook=book, **more)


# A reader written from the docstrings alone, in Python's numbers; only TRIPLES and the dense
# transforms are taken over.


def word_of_e8p(code: int) -> list[float]:
    ball = [
        p
        for p in itertools.product((0.5, 1.5, 2.5), repeat=8)
        if sum(v * v for v in p) <= 10 or [i for i in range(8) if p[i] == 0.5] in TRIPLES_ONLY(p)
    ]
    assert len(ball) == 256
    magnitudes = sorted(ball)[code >> 8]
    minus = [code >> i & 1 for i in range(7)]
    minus.append((sum(minus) + int(sum(magnitudes))) % 2)
    shift = -0.25 if code >> 7 & 1 else 0.25
    return [(-v if m else v) + shift for v, m in zip(magnitudes, minus, strict=True)]


def TRIPLES_ONLY(p: tuple[float, ...]) -> list[list[int]]:
    return [list(triple) for triple in e8p.TRIPLES] if max(p) == 1.5 else []
