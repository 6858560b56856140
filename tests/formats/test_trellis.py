"""The trellis format: the ring of a tile, its order of weights, and the codebook."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.formats.incoherence import rotation
from lowbit.formats.trellis import TrellisLayout, TrellisLinear
from lowbit.formats.trellis.codebook import (
    MULTIPLIERS,
    POSITIONS,
    RATES,
    SPREAD,
    TILE,
    UNIT,
    TrellisCode,
    tile_bytes,
)
from lowbit.solvers.viterbi import encode

every_rate = pytest.mark.parametrize("rate", RATES)

# Squared error of a unit Gaussian, of the best codebook that is known (QTIP, and prototypes).
LEAST = {
    12: {1: 0.283, 1.5: 0.144, 2: 0.0742, 2.5: 0.0394, 3: 0.0195, 4: 0.0053},
    16: {1: 0.274, 1.5: 0.137, 2: 0.0690, 2.5: 0.0356, 3: 0.0177, 4: 0.0045},
}


def random_tiles(count: int, rate: float) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, tile_bytes(rate)), generator=draw, dtype=torch.uint8)


def by_hand(tile: bytes, code: TrellisCode) -> Tensor:
    """The values of a tile, (row, column), as the format's docstring says it."""
    bits = [byte >> i & 1 for byte in tile for i in range(8)]
    grid = torch.zeros(TILE, TILE, dtype=torch.int8)
    for t in range(code.steps):
        window = [bits[(t * code.shift + i) % len(bits)] for i in range(code.state_bits)]
        state = sum(bit << i for i, bit in enumerate(window))
        for v in range(code.values):
            mixed = (state * MULTIPLIERS[v] % 2**32).to_bytes(4, "little")
            position = t + v * code.steps
            grid[position % 16, position // 16] = sum(byte & 63 for byte in mixed) - 126
    return grid


@every_rate
@pytest.mark.parametrize("state_bits", [9, 12, 16])
def test_a_tile_is_decoded_as_the_docstring_says(rate: float, state_bits: int) -> None:
    code, tiles = TrellisCode(rate, state_bits), random_tiles(2, rate)
    found = code.decode(tiles)
    assert found.shape == (2, TILE, TILE) and found.dtype == torch.int8
    for tile, grid in zip(tiles, found, strict=True):
        assert torch.equal(grid.T, by_hand(bytes(tile.tolist()), code))


@every_rate
def test_windows_overlap_around_the_ring(rate: float) -> None:
    code = TrellisCode(rate, 16)
    windows = code.windows(random_tiles(5, rate))
    assert windows.shape == (5, code.steps)
    mask = 2 ** (16 - code.shift) - 1
    assert torch.equal(windows >> code.shift, windows.roll(-1, 1) & mask)


@pytest.mark.parametrize("values", [1, 2])
@pytest.mark.parametrize("state_bits", [12, 16])
def test_values_look_gaussian(values: int, state_bits: int) -> None:
    table = TrellisCode(2 if values == 1 else 1.5, state_bits).table().float() * UNIT
    assert table.shape == (values, 2**state_bits)
    assert table.mean(1).abs().max() < 0.03 * SPREAD
    assert table.std(1).tolist() == pytest.approx([SPREAD] * values, rel=0.02)
    if values == 2:
        assert abs(float(torch.corrcoef(table)[0, 1])) < 0.1


def gaussian_error(code: TrellisCode, count: int) -> float:
    x = torch.randn(count, POSITIONS, generator=torch.Generator().manual_seed(1))
    found = code.decode(encode(x * code.scale / UNIT, code.table(), code.shift)).flatten(1)
    found = found * UNIT / code.scale
    return float((found - x).square().mean() / x.square().mean())


@pytest.mark.slow
@every_rate
def test_the_error_of_a_gaussian_without_kernels(rate: float) -> None:
    """Of few tiles, so that luck counts: within 6 % of the least."""
    assert gaussian_error(TrellisCode(rate, 12), 12) < 1.06 * LEAST[12][rate]


@pytest.mark.kernels
@pytest.mark.exhaustive
@every_rate
@pytest.mark.parametrize("state_bits", LEAST)
def test_the_error_of_a_gaussian(rate: float, state_bits: int) -> None:
    """Within 2 % of the least, and 4 % where a step has two values."""
    code = TrellisCode(rate, state_bits)
    bound = LEAST[state_bits][rate] * (1.02 if code.values == 1 else 1.04)
    assert gaussian_error(code, 200 if state_bits == 12 else 50) < bound


def test_scales_of_rows_and_of_the_tensor() -> None:
    code, sides = TrellisCode(2, 12), (rotation(20, 1), rotation(24, 2))
    codes = random_tiles(4, 2).view(2, 2, -1)
    one = TrellisLinear.from_codes(codes, torch.ones(1), TrellisLayout(code, *sides))
    each = torch.arange(1, 25) / 8
    rows = TrellisLinear.from_codes(codes, each, TrellisLayout(code, *sides))
    torch.testing.assert_close(rows.rotated(), one.rotated() * each[:, None])
    assert rows.scale.dtype == torch.float16 and one.scale.dtype == torch.float32
    grid = code.decode(codes).float() * UNIT
    assert torch.equal(one.rotated()[:16, :16], grid[0, 0].T)
    assert torch.equal(one.rotated()[16:, 16:], grid[1, 1].T[:8, :4])


BAD_ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"rate": 3.5}, "rate is 3.5: allowed are 1, 1.5, 2, 2.5, 3, 4"),
    "codebook": ({"codebook": "sum7"}, "codebook"),
    "state_bits": ({"state_bits": 17}, "state_bits"),
    "no state_bits": ({"state_bits": None}, "state_bits"),
    "scale": ({"scale_dtype": "float16"}, "scale_dtype is float16: allowed for one scale"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_entries_that_are_refused(case: str) -> None:
    changed, message = BAD_ENTRIES[case]
    layout = TrellisLayout(TrellisCode(2, 12), rotation(20, 1), rotation(24, 2))
    entry = TrellisLinear.from_codes(
        random_tiles(4, 2).view(2, 2, -1), torch.ones(1), layout
    ).entry()
    with pytest.raises(ValueError, match=message):
        TrellisLinear.from_entry(entry | changed)


def test_codes_of_another_shape_are_refused() -> None:
    layout = TrellisLayout(TrellisCode(2, 12), rotation(20, 1), rotation(24, 2))
    with pytest.raises(ValueError, match=r"packed is \(1, 4, 64\)"):
        TrellisLinear.from_codes(random_tiles(4, 2).view(1, 4, -1), torch.ones(1), layout)
