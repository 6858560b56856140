"""The transform is the definition's, for every kind, odd part and power of two."""

import pytest
import torch

from lowbit.kernels import hadamard
from lowbit.kernels.hadamard.factorization import choose
from lowbit.kernels.native.transform import odd_matrix
from lowbit.kernels.triton.transform import fits, transform

WIDTHS = {
    "1": 1,
    "2": 2,
    "power of two": 256,
    "odd": 7,
    "44 x 2": 88,
    "28 x 4": 112,
    "20 x 16": 320,
}


@pytest.mark.parametrize("n", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("kind", ["auto", "hartley", "random"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_the_definition(n: int, kind: str, inverse: bool) -> None:
    part, draw = choose(n, kind, 3), torch.Generator().manual_seed(n)
    x, before, after = (torch.randn(shape, generator=draw) for shape in ((3, n), (n,), (n,)))
    found = transform(x, part.power, odd_matrix(part, inverse), part.scale, before, after)
    dense = hadamard.orthogonal(n, kind, 3).dense().double()
    wanted = (x * before).double() @ (dense if inverse else dense.T) * after
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_without_signs(dtype: torch.dtype, tokens: int) -> None:
    part = choose(56, "auto", 0)
    x = torch.randn(tokens, 56, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = transform(x, part.power, odd_matrix(part, False), part.scale)
    wanted = hadamard.orthogonal(56)(x.float())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_any_leading_shape() -> None:
    part = choose(8, "auto", 0)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    found = transform(x.transpose(0, 1), 8, None, part.scale)
    torch.testing.assert_close(found, hadamard.orthogonal(8)(x).transpose(0, 1))


def test_widths_of_large_models_fit() -> None:
    wide = {
        4096: True,
        11008: True,
        14336: True,
        28672: False,
        16384: True,
        18944: True,
        2**16: False,
    }
    parts = {n: choose(n, "auto", 0) for n in wide}
    assert {n: fits(n, part.power) for n, part in parts.items()} == wide
