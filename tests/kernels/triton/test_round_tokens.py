"""Rounded tokens are those of torch, bit by bit."""

import pytest
import torch
from torch import Tensor

from lowbit.kernels.tokens import round_tokens as by_torch
from lowbit.kernels.triton.round_tokens import round_tokens


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The interpreter cuts off the lower bits of bfloat16 instead of rounding."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    return (values.view(torch.int32) & -(2**16)).view(torch.float32).to(dtype)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equal_bits(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    for shape in ((3, 37), (2, 2, 64), (1, 5000), (4, 1)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).to(dtype)
        wanted = as_stored(by_torch(x.float(), bits, symmetric), dtype)
        assert torch.equal(round_tokens(x, bits, symmetric), wanted)


def test_rows_of_one_sign_of_zeros_and_of_the_smallest_numbers() -> None:
    x = torch.stack(
        [torch.arange(9.0), -torch.arange(9.0) - 3, torch.zeros(9), torch.full((9,), 1e-42)]
    )
    for symmetric in (False, True):
        assert torch.equal(round_tokens(x, 4, symmetric), by_torch(x, 4, symmetric))


def test_a_transposed_input_and_an_empty_one() -> None:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_tokens(x.T, 4), by_torch(x.T, 4))
    assert round_tokens(x[:0], 4).shape == (0, 5)
