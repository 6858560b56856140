"""The nearest words of E8P12 are as near as those that torch finds."""

import pytest
import torch
from torch import Tensor

from lowbit.formats.lattice import search
from lowbit.formats.lattice.codebooks import E8P12
from lowbit.formats.lattice.e8p import TRIPLES
from lowbit.formats.lattice.triton import search_tables
from lowbit.kernels.triton.nearest_words import nearest_words


def found_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return nearest_words(x, *search_tables(torch.device("cpu")))


def distances(x: Tensor, codes: Tensor) -> Tensor:
    return (E8P12.decode(codes).double() - x.double()).square().sum(1)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
def test_gaussian_vectors(spread: float) -> None:
    x = spread * torch.randn(192, 8, generator=torch.Generator().manual_seed(0))
    nearest, plus, minus = found_of(x)
    wanted = search.nearest(x)
    assert (nearest == wanted).float().mean() > 0.999
    torch.testing.assert_close(distances(x, nearest), distances(x, wanted), rtol=1e-6, atol=1e-6)
    for codes, of_torch in zip((plus, minus), search.nearest_of_each_shift(x), strict=True):
        assert (codes == of_torch).float().mean() > 0.999
        assert torch.equal(codes & 128, of_torch & 128)


def test_words_are_their_own_nearest_words() -> None:
    """Every pattern with every shift and with one of many signs."""
    codes = torch.arange(0, 65536, 349).int()
    assert torch.equal(found_of(E8P12.decode(codes))[0], codes)


def test_the_patterns_of_norm_12_are_found() -> None:
    """They are the nearest to themselves, and to vectors beside them."""
    triples = torch.tensor([[0.5 if i in t else 1.5 for i in range(8)] for t in TRIPLES])
    x = triples + 0.25 + 0.05 * torch.randn(29, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found_of(x)[0], search.nearest(x))
    assert found_of(x[:0])[0].shape == (0,)
