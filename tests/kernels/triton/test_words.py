"""Words of lattices: all codes, one and two stages, any shape."""

import pytest
import torch
from torch import Tensor

from lowbit.formats.lattice.codebooks import CODEBOOKS, Codebook, codebook
from lowbit.formats.lattice.triton import book_of, stages
from lowbit.kernels.triton import words
from lowbit.kernels.triton.launch import MOST_FEW, total
from lowbit.kernels.triton.words import Words

BOOKS = [name for name, book in CODEBOOKS.items() if book.dim > 1]


def weight_of(book: Codebook, rows: int, inputs: int, scales: int, codes: Tensor | None = None):
    """A weight of random words, and the same in float64."""
    draw, blocks = torch.Generator().manual_seed(rows * inputs), book.blocks(inputs)
    if codes is None:
        codes = torch.randint(0, 2**book.code_bits, (rows, blocks), generator=draw)
    codes = codes.to(book.code_dtype)
    scale = torch.rand(scales, generator=draw) + 0.5
    weight = Words(book.pack(codes), inputs, book.dim, scale, *stages(book, torch.device("cpu")))
    values = book.decode(codes).flatten(1)[:, :inputs].double()
    return weight, values * scale.double().unsqueeze(1)


def check(found: Tensor, x: Tensor, weight: Tensor) -> None:
    exact = x.double() @ weight.T
    torchs = (x.float() @ weight.float().T - exact).abs().max()
    rounding = 2**-23 * (x.double().abs() @ weight.abs().T).max()
    assert (found.double() - exact).abs().max() <= 2 * torchs + rounding


@pytest.mark.parametrize(
    ("name", "tokens"), [*((name, 3) for name in BOOKS), ("E8P12", 1), ("E8P12RVQ3B", MOST_FEW)]
)
def test_a_few_tokens(name: str, tokens: int) -> None:
    for rows, inputs, scales in ((9, 64, 9), (5, 37, 1)):
        weight, wanted = weight_of(codebook(name), rows, inputs, scales)
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens))
        check(total(words.few(x, weight)), x, wanted)


def test_inputs_are_cut_into_parts() -> None:
    weight, wanted = weight_of(codebook("E8P12"), 4, 600, 4)
    x = torch.randn(1, 600, generator=torch.Generator().manual_seed(0))
    parts = words.few(x, weight)
    assert len(parts) == 3
    check(total(parts), x, wanted)


@pytest.mark.parametrize("name", BOOKS)
def test_written_weights(name: str) -> None:
    for rows, inputs, scales in ((17, 131, 17), (3, 5, 1)):
        weight, wanted = weight_of(codebook(name), rows, inputs, scales)
        around = torch.zeros(rows, inputs + 2)
        words.write(around[:, 1:-1], weight)
        torch.testing.assert_close(around[:, 1:-1].double(), wanted, rtol=3e-7, atol=1e-7)
        assert not around[:, 0].any() and not around[:, -1].any()


@pytest.mark.parametrize("name", ["E8P12", "D4"])
def test_every_code(name: str) -> None:
    """Those of E8 are in the second stage, which the next test walks through."""
    book = codebook(name)
    codes = torch.arange(2**book.code_bits).view(-1, min(512, 2**book.code_bits))
    weight, wanted = weight_of(book, len(codes), codes.shape[1] * book.dim, 1, codes)
    found = torch.zeros(wanted.shape)
    words.write(found, weight)
    assert torch.equal(found.double(), (wanted / weight.scale.double()).float() * weight.scale)


@pytest.mark.parametrize("scale", [1 / 2.04, -0.3])
def test_every_code_of_the_second_stage(scale: float) -> None:
    book = codebook("E8P12RVQ3B", scale)
    weight, wanted = weight_of(book, 2, 1024, 1, torch.arange(256).view(2, 128) << 16)
    found = torch.zeros(wanted.shape)
    words.write(found, weight)
    torch.testing.assert_close(found.double(), wanted, rtol=3e-7, atol=1e-7)


def test_tables() -> None:
    """The patterns of E8P12 with their parity, and the words of E8, whose last number is signed."""
    patterns = book_of("E8P12", torch.device("cpu")).table
    assert len(patterns.unique()) == 256 and int(patterns.max()) < 2**17
    eight = book_of("E8", torch.device("cpu"))
    assert len(eight.table.unique()) == 256 and int(eight.table.min()) < 0
