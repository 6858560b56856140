from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.kernels.bits import pack, packed_bytes, unpack

ALL_BITS = range(1, 9)


def bit_stream(row: list[int], bits: int) -> bytes:
    """The definition, as one big integer."""
    stream = sum(code << (j * bits) for j, code in enumerate(row))
    return stream.to_bytes(packed_bytes(len(row), bits), "little")


def random_codes(*shape: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(ALL_BITS))
def test_bytes_are_the_bit_stream(data: st.DataObject, bits: int) -> None:
    row = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack(torch.tensor(row, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == bit_stream(row, bits)
    assert unpack(packed, bits, len(row)).tolist() == row


@pytest.mark.parametrize("bits", ALL_BITS)
def test_round_trip_of_any_shape(bits: int) -> None:
    for lead, count in product([(), (3,), (0,), (2, 1, 3)], [0, 1, 7, 8, 9, 301]):
        codes = random_codes(*lead, count, bits=bits)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.is_contiguous()
        assert packed.shape == (*lead, packed_bytes(count, bits))
        unpacked = unpack(packed, bits, count)
        assert unpacked.is_contiguous() and torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_all_codes_in_all_places(bits: int) -> None:
    every = torch.arange(2**bits, dtype=torch.uint8)
    codes = torch.stack([every.roll(shift) for shift in range(8)])
    assert torch.equal(unpack(pack(codes, bits), bits, 2**bits), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_views_and_no_alias(bits: int) -> None:
    codes = random_codes(16, 5, bits=bits)
    packed = pack(codes.T, bits)
    assert torch.equal(packed, pack(codes.T.contiguous(), bits))
    strided = packed.T.contiguous().T
    unpacked = unpack(strided, bits, 16)
    assert torch.equal(unpacked, codes.T)
    unpacked.zero_()
    assert torch.equal(strided, packed), "unpack returned a view of its input"


@pytest.mark.parametrize("bits", ALL_BITS)
def test_shapes_on_meta(bits: int) -> None:
    packed = torch.empty(3, packed_bytes(17, bits), dtype=torch.uint8, device="meta")
    assert unpack(packed, bits, 17).shape == (3, 17)


BYTES = torch.zeros(2, 4, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_bits_out_of_range(bits: int) -> None:
    for call in (lambda: pack(BYTES, bits), lambda: unpack(BYTES, bits, 4)):
        with pytest.raises(ValueError, match=f"bits is {bits}: allowed are 1 to 8"):
            call()


@pytest.mark.parametrize("bits", range(1, 8))
def test_code_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"up to {2**bits}: allowed at {bits} bits are 0 to"):
        pack(BYTES + 2**bits, bits)


def test_wrong_dtype_and_width() -> None:
    with pytest.raises(ValueError, match=r"codes is torch.int32: allowed is torch.uint8"):
        pack(BYTES.int(), 4)
    with pytest.raises(ValueError, match=r"packed is torch.int8: allowed is torch.uint8"):
        unpack(BYTES.to(torch.int8), 4, 8)
    for count in (-8, 6, 9):
        with pytest.raises(ValueError, match=f"packed has 4 bytes per row: {count} codes of 4"):
            unpack(BYTES, 4, count)
