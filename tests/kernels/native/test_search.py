"""The search for nearest words in C: the codes of the search in torch, on all instruction sets."""

from functools import cache

import pytest
import torch
from torch import Tensor

from lowbit.formats.lattice import search
from lowbit.kernels.native import available
from lowbit.kernels.native import search as native

COUNTS = (0, 1, 2, 31, 32, 33, 100, 1000)  # of vectors, of which 32 are searched at once


@cache
def vectors() -> Tensor:
    """Vectors of all sizes, some with equal distances from several words."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0, 1e30]).repeat_interleave(150)
    x = torch.randn(1000, 8, generator=draw)
    x[: len(sizes)] *= sizes.unsqueeze(1)
    x[300:600] = (4 * x[300:600]).round() / 4
    x[-1] = 0
    return x


@cache
def by_torch(each_shift: bool) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.formats.lattice.search.why_not", lambda: "forced")
        return torch.stack(search._in_chunks(vectors(), each_shift))


@pytest.mark.kernels
@pytest.mark.parametrize("each_shift", [False, True], ids=["nearest", "of each shift"])
@pytest.mark.parametrize("instruction_set", available())
def test_codes_are_equal(instruction_set: str, each_shift: bool) -> None:
    tables = search._tables(torch.device("cpu"))
    for count in COUNTS:
        found = native.nearest(
            vectors()[-count:] if count else vectors()[:0],
            tables.triple_places,
            tables.number,
            each_shift,
            instruction_set,
        )
        assert torch.equal(found, by_torch(each_shift)[:, len(vectors()) - count :])


@pytest.mark.kernels
def test_the_search_uses_it_for_any_shape_and_layout() -> None:
    if not available():
        pytest.skip("needs a compiler: the kernels were not compiled")
    x = vectors()[:60].view(3, 20, 8).transpose(0, 1)
    assert torch.equal(search.nearest(x), by_torch(False)[0, :60].view(3, 20).T)
    plus, minus = search.nearest_of_each_shift(x.double())
    assert torch.equal(torch.stack([plus, minus]), by_torch(True)[:, :60].view(2, 3, 20).mT)


@pytest.mark.kernels
def test_values_that_are_no_numbers_do_no_harm() -> None:
    """The codes mean nothing, but are codes."""
    if not available():
        pytest.skip("needs a compiler: the kernels were not compiled")
    x = torch.full((20, 8), torch.nan)
    x[3:] = torch.inf
    codes = search.nearest(x)
    assert (codes >= 0).all() and (codes < 2**16).all()


@pytest.mark.parametrize("each_shift", [False, True], ids=["nearest", "of each shift"])
def test_codes_are_equal_where_no_vectors_are_picked_out(
    each_shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which Python would have to wait for."""
    monkeypatch.setattr("lowbit.formats.lattice.search._picks", lambda x: False)
    assert torch.equal(torch.stack(search._in_chunks(vectors(), each_shift)), by_torch(each_shift))
