"""What the bits of a tile mean: windows of a ring of bits, and the values computed of them.

Codebook "sum6": a state s means the whole numbers

    value v = sum of the lower 6 bits of each of the four bytes of (s * MULTIPLIERS[v] mod 2**32)
              - 126

from -126 to 126, with a standard deviation of 36.95. Every multiplier gives nearly the same
distribution, but some give states that follow each other values that are more alike: of 6,500 odd
numbers, MULTIPLIERS are those with the least error (`benchmarks/trellis.py search`). For a unit
Gaussian, the squared error of a weight is then, with state_bits of 12 and of 16:

| rate | 1     | 1.5   | 2     | 2.5   | 3     | 4      |
| ---- | ----- | ----- | ----- | ----- | ----- | ------ |
| 12   | .2782 | .1445 | .0724 | .0391 | .0190 | .00505 |
| 16   | .2724 | .1373 | .0693 | .0355 | .0178 | .00458 |
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

TILE = 16  # rows and columns of a tile
POSITIONS = TILE * TILE
RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
MULTIPLIERS = (2406234277, 4075449853)
UNIT = 1 / 32  # weights are scale * UNIT * value, so that the scale is about that of the weights
SPREAD = 36.95 * UNIT  # standard deviation of UNIT * value
# Standard deviation of Gaussian weights over that of the values, with the least error, by rate.
RATIOS = {1.0: 1.1, 1.5: 1.0, 2.0: 0.96, 2.5: 0.94, 3.0: 0.92, 4.0: 0.89}
WINDOWS_AT_ONCE = 2**22  # that are decoded at once: 16 MiB each


def tiles(features: int) -> int:
    """Returns the number of tiles that cover so many rows or columns."""
    return -(-features // TILE)


def checked_rate(rate: float) -> float:
    """Returns the rate. Raises ValueError if it is not one of RATES."""
    if rate not in RATES:
        raise ValueError(f"rate is {rate}: allowed are {', '.join(f'{r:g}' for r in RATES)}")
    return rate


def tile_bytes(rate: float) -> int:
    return round(POSITIONS * rate) // 8


@dataclass(frozen=True)
class TrellisCode:
    """A code of a tile; the format's docstring explains it.

    rate: bits per weight, one of RATES.
    state_bits: bits of a window. With more of them the error is lower; encoding takes twice as long
        for each.
    """

    rate: float
    state_bits: int

    @property
    def values(self) -> int:
        """Weights of a step."""
        return 1 if self.rate == int(self.rate) else 2

    @property
    def shift(self) -> int:
        """Bits of a step."""
        return round(self.rate * self.values)

    @property
    def steps(self) -> int:
        return POSITIONS // self.values

    @property
    def scale(self) -> float:
        """The root mean square that Gaussian weights should have when they are rounded."""
        return SPREAD * RATIOS[self.rate]

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns the values of all states: (values, 2**state_bits) int8; do not modify it."""
        return _table(self.state_bits, self.values, torch.device(device))

    def windows(self, packed: Tensor) -> Tensor:
        """Returns the state of each step. packed: (..., bytes) uint8 -> (..., steps) int32"""
        ring = torch.cat([packed, packed[..., :2]], -1).int()
        words = ring[..., :-2] | ring[..., 1:-1] << 8 | ring[..., 2:] << 16
        first = torch.arange(self.steps, device=packed.device) * self.shift
        return words[..., first // 8] >> (first % 8).int() & 2**self.state_bits - 1

    def decode(self, packed: Tensor) -> Tensor:
        """Returns the values of tiles. packed: (..., bytes) uint8 -> (..., column, row) int8"""
        table, flat = self.table(packed.device), packed.reshape(-1, packed.shape[-1])
        made = flat.new_empty(len(flat), self.values, self.steps, dtype=torch.int8)
        at_once = WINDOWS_AT_ONCE // self.steps
        for codes, into in zip(flat.split(at_once), made.split(at_once), strict=True):
            windows = self.windows(codes)
            for v in range(self.values):
                into[:, v] = table[v][windows]
        return made.view(*packed.shape[:-1], TILE, TILE)


@lru_cache(maxsize=32)
def _table(state_bits: int, values: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        states = torch.arange(2**state_bits, dtype=torch.int64)
        made = [_sum6(states, multiplier) for multiplier in MULTIPLIERS[:values]]
        return torch.stack(made).to(device)


def _sum6(states: Tensor, multiplier: int) -> Tensor:
    mixed = states * multiplier
    total = sum((mixed >> 8 * byte & 63 for byte in range(4)), torch.zeros_like(states))
    return (total - 126).to(torch.int8)
