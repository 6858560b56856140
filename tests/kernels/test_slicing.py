import math

import pytest
import torch

from lowbit.kernels.slicing import rounded_codes, slice_codes, step

WIDTHS = range(2, 9)
ALL = torch.arange(256, dtype=torch.uint8)


def by_definition(code: int, bits: int, extra_precision: bool) -> int:
    """Equation 6, and 8, with half rounded up."""
    rounded = math.floor(code / 2 ** (8 - bits) + 0.5)
    return rounded if extra_precision or bits == 8 else min(rounded, 2**bits - 1)


@pytest.mark.parametrize("extra_precision", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_all_codes_against_the_definition(bits: int, extra_precision: bool) -> None:
    wanted = [by_definition(code, bits, extra_precision) for code in range(256)]
    assert slice_codes(ALL, bits, extra_precision).tolist() == wanted
    assert max(wanted) == (2**bits if extra_precision and bits < 8 else 2**bits - 1)


@pytest.mark.parametrize("extra_precision", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_slices_in_units_of_the_master(bits: int, extra_precision: bool) -> None:
    wanted = slice_codes(ALL, bits, extra_precision).int() * step(bits)
    before = ALL.clone()
    assert torch.equal(rounded_codes(ALL, bits, extra_precision).int(), wanted)
    assert torch.equal(ALL, before)


@pytest.mark.parametrize(
    ("code", "bits", "extra_precision", "value"),
    [(53, 2, False, 64), (240, 2, False, 192), (234, 2, False, 192), (240, 2, True, 256)],
)
def test_the_papers_examples(code: int, bits: int, extra_precision: bool, value: int) -> None:
    sliced = slice_codes(torch.tensor([code], dtype=torch.uint8), bits, extra_precision)
    assert int(sliced) * step(bits) == value


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_a_slice_is(bits: int) -> None:
    values = slice_codes(ALL, bits).int() * step(bits)
    assert torch.equal(slice_codes(values.to(torch.uint8), bits).int() * step(bits), values)
    assert (values.diff() >= 0).all() and len(values.unique()) == 2**bits
    error, near = (values - ALL.int()).abs(), ALL.int() < 256 - step(bits) / 2
    assert error[near].max() <= step(bits) / 2
    assert error.max() <= max(0, step(bits) - 1)


def test_a_slice_of_a_slice_is_another() -> None:
    fours = slice_codes(ALL, 4) * 16
    assert int((slice_codes(fours, 2) != slice_codes(ALL, 2)).sum()) == 24


@pytest.mark.parametrize(("bits", "ties"), [(2, 2), (3, 4), (4, 8), (6, 32)])
def test_half_rounds_up_and_not_to_even(bits: int, ties: int) -> None:
    to_even = torch.round(ALL.float() / step(bits)).clamp(max=2**bits - 1)
    assert int((slice_codes(ALL, bits) != to_even).sum()) == ties


def test_the_next_plane_of_bits_is_enough() -> None:
    """A slice needs the upper bits and one more; what lies below changes nothing."""
    for bits in range(2, 8):
        kept = ALL & (0xFF << (7 - bits) & 0xFF)
        assert torch.equal(slice_codes(kept, bits), slice_codes(ALL, bits))


def test_the_masters_codes_stay_as_they_are() -> None:
    codes = ALL.clone()
    for bits in WIDTHS:
        slice_codes(codes, bits).zero_()
    assert torch.equal(codes, ALL)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_widths_that_are_none(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}: allowed are 2 to 8"):
        slice_codes(ALL, bits)


def test_codes_are_bytes() -> None:
    with pytest.raises(ValueError, match=r"codes is torch.int64: allowed is torch.uint8"):
        slice_codes(ALL.long(), 4)
