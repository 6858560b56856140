"""Products with trellis codes in C: torch's decoded weights, equal bits everywhere."""

import pytest
import torch
from torch import Tensor

from lowbit.formats.trellis.codebook import MULTIPLIERS, RATES, TrellisCode, tile_bytes, tiles
from lowbit.kernels.native import available
from lowbit.kernels.native.trellis import TrellisProduct, multiply

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not available(), reason="needs a compiler: the kernels were not compiled"),
]
SIZES = {"one tile": (16, 16), "ragged": (21, 37), "pieces": (40, 1100), "one": (1, 1)}


def layer(rate: float, state_bits: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows + columns)
    shape = tiles(rows), tiles(columns), tile_bytes(rate)
    packed = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    return packed, torch.rand(rows, generator=draw) + 0.5


def inputs(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


def product(rate: float, state_bits: int, top: int) -> TrellisProduct:
    code = TrellisCode(rate, state_bits)
    return TrellisProduct(state_bits, code.shift, code.values, MULTIPLIERS, top)


def rounded(x: Tensor, top: int) -> Tensor:
    parts = []
    for piece in x.double().split(512, 1):
        step = piece.abs().amax(1, keepdim=True).float().double() / top
        parts.append((piece / step).round() * step)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("top", [127, 16200])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("size", SIZES)
def test_every_set_and_number_of_tokens(size: str, rate: float, top: int) -> None:
    rows, columns = SIZES[size]
    for state_bits in (9, 16):
        packed, scale = layer(rate, state_bits, rows, columns)
        how, x = product(rate, state_bits, top), inputs(7, columns).repeat(3, 1)
        grid = TrellisCode(rate, state_bits).decode(packed).double()
        weight = grid.permute(0, 3, 1, 2).reshape(16 * len(grid), -1)[:rows, :columns]
        wanted = rounded(x, top) @ weight.T * scale.double()
        found = [multiply(x, packed, scale, how, name) for name in available()]
        assert (found[0] - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp_min(1)
        for other in found[1:]:
            assert torch.equal(other, found[0])
        for name in available():
            for tokens in (1, 4):
                some = multiply(x[:tokens], packed, scale, how, name)
                assert torch.equal(some, found[0][:tokens])


def test_inputs_that_cannot_be_rounded() -> None:
    """Huge ones are multiplied as floats; of NaN and infinity comes what floats give."""
    packed, scale = layer(2.0, 12, 20, 40)
    how, x = product(2.0, 12, 16200), inputs(4, 40)
    x[1] *= 1e35
    x[2, 3] = torch.nan
    for name in available():
        y = multiply(x, packed, scale, how, name)
        assert y[[0, 3]].isfinite().all() and not y[2].isfinite().any()
        torch.testing.assert_close(
            y[1] / 1e35, multiply(inputs(4, 40), packed, scale, how)[1], rtol=1e-3, atol=0.5
        )


def test_extreme_sums_do_not_overflow() -> None:
    """All bits 1 would be one value; here every value is the largest of a random layer."""
    packed, scale = layer(2.0, 12, 16, 512)
    x = torch.ones(1, 512)
    grid = TrellisCode(2.0, 12).decode(packed).double().permute(0, 3, 1, 2).reshape(16, 512)
    x = torch.where(grid[0] > 0, 1.0, -1.0).float()[None]
    wanted = x.double() @ grid.T * scale.double()
    for name in available():
        found = multiply(x, packed, scale, product(2.0, 12, 16200), name)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-2)
