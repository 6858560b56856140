"""The transforms in C give what the definition gives, for every kind and any odd part."""

import pytest
import torch

from lowbit.kernels import hadamard
from lowbit.kernels.hadamard.factorization import choose
from lowbit.kernels.native.library import available
from lowbit.kernels.native.transform import NativeTransform, odd_matrix

pytestmark = pytest.mark.skipif(
    not available(), reason="needs a compiler: the kernels were not compiled"
)
WIDTHS = {"1": 1, "2": 2, "a power of two": 64, "odd": 7, "44 x 2": 88, "28 x 4": 112}


@pytest.mark.parametrize("n", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("kind", ["auto", "hartley", "random"])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_definition(n: int, kind: str, inverse: bool) -> None:
    part = choose(n, kind, 3)
    x, before, after = torch.randn(3, n), torch.randn(n), torch.randn(n)
    matrix = odd_matrix(part, inverse)
    found = NativeTransform(n, part.power, matrix, part.scale, before, after)(x)
    dense = hadamard.orthogonal(n, kind, 3).dense().double()
    wanted = (x * before).double() @ (dense if inverse else dense.T) * after
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("n", [*WIDTHS.values(), 256, 11 * 64], ids=str)
def test_equal_bits_for_any_number_of_tokens_and_set(n: int) -> None:
    part, x = choose(n, "auto", 0), torch.randn(21, n)
    before, after = torch.randn(2, n)
    matrix = odd_matrix(part, False)
    run = NativeTransform(n, part.power, matrix, part.scale, before, after)
    wanted = run(x, "portable")
    for name in available():
        assert torch.equal(run(x, name), wanted)
        assert torch.equal(torch.cat([run(row[None], name) for row in x]), wanted)
