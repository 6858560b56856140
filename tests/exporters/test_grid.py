"""Every change of container keeps each weight, or is refused."""

import pytest
import torch

from lowbit.exporters.grid import (
    Grid,
    Refused,
    divides,
    grid_of,
    half_scales,
    largest_group,
    regrouped,
    widened,
    with_whole_zeros,
)
from lowbit.formats.nested import NestedLayout, NestedLinear
from lowbit.formats.uniform import UniformLayout, UniformLinear

ROWS = 7


def grid(
    bits: int = 4, columns: int = 24, size: int = 8, shift: int = 0, symmetric: bool = False
) -> Grid:
    """A random grid in which every code and many zero points occur."""
    draw = torch.Generator().manual_seed(bits + columns + size)
    groups = -(-columns // size)
    codes = torch.randint(0, 2**bits, (ROWS, columns), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(ROWS, groups, generator=draw) + 0.01).half()
    zero = torch.randint(0, 2 ** (bits + shift), (ROWS, groups), generator=draw).int()
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    return Grid(codes, scale, zero, bits, size, shift)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [8, 7, 24])
@pytest.mark.parametrize("bits", [2, 3, 6])
def test_the_weight_is_that_of_the_layer(bits: int, size: int, shift: int) -> None:
    draw = grid(bits, 24, size, shift)
    layout = UniformLayout(bits, None if size == 24 else size, shift)
    layer = UniformLinear.from_codes(draw.codes, draw.scale, draw.zero, layout)
    found = grid_of(layer)
    assert found is not None and found.group_size == size and not found.symmetric
    assert torch.equal(found.weight(), layer.dequantize())
    assert found.error(layer.dequantize()) == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_slices(bits: int, extra: bool, symmetric: bool) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 256, (ROWS, 24), generator=draw, dtype=torch.uint8)
    codes[0, 0] = 255  # with extra precision it uses the code 2**bits
    scale = torch.rand(ROWS, 3, generator=draw).half()
    zero = None if symmetric else torch.randint(0, 256, (ROWS, 3), generator=draw).to(torch.uint8)
    layer = NestedLinear.from_codes(codes, scale, zero, NestedLayout(8, extra)).at(bits)
    found = grid_of(layer)
    assert found is not None and found.bits == bits + (extra and bits < 8)
    assert found.symmetric == symmetric or not symmetric
    assert torch.equal(found.weight(), layer.dequantize())


REGROUPED = {
    "halved": (grid(size=8), 4),
    "a row": (grid(size=24), 8),
    "ragged": (grid(columns=20, size=8), 4),
    "same": (grid(size=8), 8),
    "one": (grid(columns=20, size=8), 1),
}


@pytest.mark.parametrize(("before", "size"), REGROUPED.values(), ids=REGROUPED)
def test_regrouped(before: Grid, size: int) -> None:
    after = regrouped(before, size)
    assert after.group_size == size and after.scale.shape[1] == before.in_features // size
    assert torch.equal(after.weight(), before.weight())


@pytest.mark.parametrize(
    ("before", "size"), [(grid(size=8), 3), (grid(size=8), 16), (grid(columns=20, size=8), 8)]
)
def test_groups_that_do_not_divide_are_refused(before: Grid, size: int) -> None:
    assert not divides(before, size) or size == before.group_size
    if size != before.group_size:
        with pytest.raises(Refused, match=f"in groups of {size}"):
            regrouped(before, size)


def test_largest_group() -> None:
    assert largest_group(grid(size=24), (4, 8, 16)) == 8
    assert largest_group(grid(columns=20, size=8), (16, 8, 3)) is None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "wide"), [(2, 3), (2, 8), (3, 4), (7, 8), (4, 4)])
def test_widened(bits: int, wide: int, symmetric: bool) -> None:
    before = grid(bits, symmetric=symmetric)
    after = widened(before, wide)
    assert after.bits == wide and after.symmetric == before.symmetric
    assert torch.equal(after.weight(), before.weight())
    assert int(after.codes.max()) < 2**wide and int(after.zero.max()) < 2**wide


@pytest.mark.parametrize(("bits", "wide"), [(4, 3), (8, 9)])
def test_codes_that_do_not_fit_are_refused(bits: int, wide: int) -> None:
    with pytest.raises(Refused, match=f"{bits} bits cannot be written with {wide} bits"):
        widened(grid(bits), wide)


@pytest.mark.parametrize(("bits", "shift"), [(2, 6), (3, 2), (4, 4), (4, 0)])
def test_zero_points_become_whole(bits: int, shift: int) -> None:
    before = grid(bits, shift=shift)
    after = with_whole_zeros(before)
    assert after.zero_shift == 0 and after.bits == bits + shift
    assert torch.equal(after.weight(), before.weight())


def test_zero_points_that_are_whole_need_no_bits() -> None:
    before = grid(3, shift=2)
    before = Grid(before.codes, before.scale, before.zero // 4 * 4, 3, 8, 2)
    after = with_whole_zeros(before)
    assert after.bits == 3 and torch.equal(after.weight(), before.weight())


def test_a_scale_that_float16_would_round_becomes_float32() -> None:
    before = grid(2, shift=6)
    before = Grid(before.codes, torch.full_like(before.scale, 2.0**-14), before.zero, 2, 8, 6)
    before.scale[0, 0] = 1.001 * 2**-14
    after = with_whole_zeros(before)
    assert after.scale.dtype == torch.float32
    assert torch.equal(after.weight(), before.weight())


def test_half_scales() -> None:
    exact = grid()
    wide = Grid(exact.codes, exact.scale.float(), exact.zero, 4, 8)
    assert torch.equal(half_scales(wide).scale, exact.scale)
    with pytest.raises(Refused, match="float16 would round some"):
        half_scales(Grid(exact.codes, exact.scale.float() * 1.0001, exact.zero, 4, 8))


def test_error_in_steps() -> None:
    wanted = grid()
    weight = wanted.weight()
    weight[2, 3] += 0.25 * float(wanted.scale[2, 0])
    assert wanted.error(weight) == pytest.approx(0.25, rel=1e-3)
    nothing = Grid(wanted.codes, torch.zeros_like(wanted.scale), wanted.zero, 4, 8)
    assert nothing.error(nothing.weight()) == 0
    assert nothing.error(nothing.weight() + 1e-9) == torch.inf
