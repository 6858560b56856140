"""Integer products of rounded inputs: equal codes, exact sums, any group."""

import pytest
import torch

from lowbit.formats.sorted_group import reference
from lowbit.kernels.bits import pack
from lowbit.kernels.triton.group_sums import Codes, multiply, rounded_groups

SHAPES = {
    "groups": (9, 64, 16),
    "ragged": (5, 45, 20),
    "one group": (70, 150, 150),
    "tiny": (1, 3, 2),
}


@pytest.mark.parametrize(("kept", "size"), [(64, 16), (45, 20), (2100, 2100), (3, 2)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_are_rounded_as_torch_rounds_them(bits: int, kept: int, size: int) -> None:
    x = torch.randn(3, kept + 5, generator=torch.Generator().manual_seed(bits))
    x[0] = 0
    x[1, :kept] = x[1, :kept].sign() * torch.arange(kept).remainder(7) / 2  # ties
    codes, scales = rounded_groups(x, kept, bits, size)
    wanted, steps = reference.quantize_input(x[:, :kept], bits, size)
    assert torch.equal(codes.float(), wanted) and torch.equal(scales, steps)


@pytest.mark.parametrize("tokens", [1, 3, 16, 20])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("salient", ["none", "float16", "int8"])
def test_products(shape: tuple[int, int, int], tokens: int, salient: str) -> None:
    (rows, kept, size), draw = shape, torch.Generator().manual_seed(tokens)
    bits, count = (3, 0) if salient == "none" else (8, 19)
    codes = torch.randint(0, 2**bits, (rows, kept), generator=draw, dtype=torch.uint8)
    scale = torch.rand(rows, -(-kept // size), generator=draw).half() + 0.1
    weight, factor = torch.randn(rows, count, generator=draw).half(), None
    if salient == "int8":
        weight = torch.randint(-127, 128, (rows, count), generator=draw, dtype=torch.int8)
        factor = torch.rand(rows, generator=draw).half() / 100
    x = torch.randn(tokens, kept + count, generator=draw)
    given = Codes(pack(codes, bits), kept, bits, scale, size, weight if count else None, factor)
    found = multiply(x, given, 4)
    inputs, steps = reference.quantize_input(x[:, :kept], 4, size)
    sums = reference.group_sums(inputs, codes.float() - 2 ** (bits - 1), size)
    wanted = reference.total(sums, steps, scale.float())
    if count:
        beside = weight.float() if factor is None else weight.float() * factor.float()[:, None]
        wanted = wanted + x[:, kept:] @ beside.T
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
