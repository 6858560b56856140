"""Trellis codes: every rate and number of state bits, against the format's own decoder."""

import pytest
import torch
from torch import Tensor

from lowbit.formats.trellis.codebook import MULTIPLIERS, RATES, TrellisCode, tile_bytes, tiles
from lowbit.kernels.triton import trellis
from lowbit.kernels.triton.launch import MOST_FEW, total
from lowbit.kernels.triton.trellis import Trellis


def weight_of(code: TrellisCode, rows: int, inputs: int) -> tuple[Trellis, Tensor]:
    """A weight of random bits, and the same in float64."""
    draw = torch.Generator().manual_seed(rows * inputs)
    shape = tiles(rows), tiles(inputs), tile_bytes(code.rate)
    packed = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    scale = torch.rand(rows, generator=draw) + 0.5
    values = code.decode(packed).permute(0, 3, 1, 2).reshape(16 * shape[0], -1)[:rows, :inputs]
    weight = Trellis(packed, scale, inputs, code.state_bits, code.shift, code.values, MULTIPLIERS)
    return weight, values.double() * scale.double().unsqueeze(1)


def check(found: Tensor, x: Tensor, weight: Tensor) -> None:
    exact = x.double() @ weight.T
    torchs = (x.float() @ weight.float().T - exact).abs().max()
    rounding = 2**-23 * (x.double().abs() @ weight.abs().T).max()
    assert (found.double() - exact).abs().max() <= 2 * torchs + rounding


@pytest.mark.parametrize(
    ("rate", "tokens"), [*((rate, 3) for rate in RATES), (2, 1), (1.5, MOST_FEW), (4, MOST_FEW)]
)
def test_a_few_tokens(rate: float, tokens: int) -> None:
    weight, wanted = weight_of(TrellisCode(rate, 12), 21, 37)
    x = torch.randn(tokens, 37, generator=torch.Generator().manual_seed(tokens))
    check(total(trellis.few(x, weight)), x, wanted)


@pytest.mark.parametrize("state_bits", [9, 16])
@pytest.mark.parametrize("rate", RATES)
def test_written_weights_are_exact(rate: float, state_bits: int) -> None:
    weight, wanted = weight_of(TrellisCode(rate, state_bits), 35, 150)
    around = torch.zeros(35, 152)
    trellis.write(around[:, 1:-1], weight)
    assert torch.equal(around[:, 1:-1], wanted.float())
    assert not around[:, 0].any() and not around[:, -1].any()


def test_inputs_are_cut_into_parts() -> None:
    weight, wanted = weight_of(TrellisCode(2, 16), 16, 600)
    x = torch.randn(1, 600, generator=torch.Generator().manual_seed(0))
    parts = trellis.few(x, weight)
    assert len(parts) == 2
    check(total(parts), x, wanted)


def test_bits_that_do_not_begin_at_a_word() -> None:
    weight, _ = weight_of(TrellisCode(2, 16), 16, 16)
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), weight.packed.flatten()])[1:]
    other = Trellis(moved.view(weight.packed.shape), *list(vars(weight).values())[1:])
    assert torch.equal(other.words(), weight.words())
