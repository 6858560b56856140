"""Losses at widths that were not measured."""

import pytest

from lowbit.allocate.losses import losses_at

CASES = {
    "measured widths keep their loss": ([4, 3, 2], {2: 0.3, 3: 0.1, 4: 0.02}, [0.02, 0.1, 0.3]),
    "6 dB per bit above": ([8, 5], {2: 0.4, 4: 0.02}, [0.02 / 256, 0.02 / 4]),
    "and below": ([1.5, 1], {2: 0.4, 4: 0.02}, [0.8, 1.6]),
    "the geometric mean half way": ([2.5], {2: 0.4, 3: 0.1}, [0.2]),
    "more bits are never worse": ([4, 3, 2], {2: 0.1, 3: 0.3, 4: 0.2}, [0.1, 0.1, 0.1]),
    "nothing is lost": ([3, 2, 2.5, 8], {2: 0.0, 3: 0.0}, [0, 0, 0, 0]),
    "nothing is lost at the wider one": ([2.5, 8], {2: 0.4, 3: 0.0}, [0.2, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_losses(name: str) -> None:
    widths, measured, wanted = CASES[name]
    assert losses_at(widths, measured) == pytest.approx(wanted)
