"""The shape of pyramids."""

import pytest

from lowbit.allocate.pyramid import pyramid
from lowbit.allocate.units import Layout, Unit


def layout(blocks: int, outside: bool = False) -> Layout:
    """Two units per block, which take w and 3 * w bytes at w bits."""
    units = [
        Unit((f"{block}.{part}",), block, (), {w: part * w for w in (2, 3, 4, 6, 8)})
        for block in range(blocks)
        for part in (1, 3)
    ]
    extra = [Unit(("head",), None, (), {w: w for w in (2, 3, 4, 6, 8)})] if outside else []
    return Layout((*units, *extra), blocks)


@pytest.mark.parametrize(
    ("blocks", "widths", "mean", "wanted"),
    [
        (8, (8, 4, 2), 2, "22222222"),
        (8, (8, 4, 2), 2.9, "22244222"),
        (8, (8, 4, 2), 3.5, "24444442"),
        (8, (8, 4, 2), 4.5, "24488442"),
        (8, (8, 4, 2), 6.4, "24888842"),
        (7, (8, 4, 2), 4, "2448442"),
        (10, (8, 6, 4, 3, 2), 4.6, "2366666632"),
        (6, (8,), 8, "888888"),
        (1, (8, 2), 8, "2"),
    ],
)
def test_shapes(blocks: int, widths: tuple[int, ...], mean: float, wanted: str) -> None:
    found = pyramid(layout(blocks), widths, int(4 * blocks * mean))
    assert found[::2] == found[1::2]
    shape = found[::2]
    assert sum(shape) <= mean * blocks and shape == shape[::-1]
    half = shape[: (blocks + 1) // 2]
    assert half == sorted(half) and (len(widths) == 1 or half[0] == min(widths))
    assert "".join(map(str, shape)) == wanted


def test_a_unit_in_no_block_goes_with_the_middle() -> None:
    assert pyramid(layout(3, outside=True), (8, 4, 2), 10**6)[-1] == 8


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="limit is 31: the lowest width everywhere takes 32"):
        pyramid(layout(4), (4, 2), 31)
