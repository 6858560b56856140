"""Packs codes of 1 to 8 bits into bytes, and unpacks them.

Each row is a separate little-endian bit stream: code j occupies bits [j * bits, (j + 1) * bits),
low bits first, and bit i of the row is bit i % 8 of its byte i // 8. A row of `count` codes takes
ceil(count * bits / 8) bytes; the unused bits of its last byte are zero.
"""

import torch
from torch import Tensor
from torch.nn import functional


def packed_bytes(count: int, bits: int) -> int:
    """Returns the bytes of a row of `count` codes. Raises ValueError unless bits is 1 to 8."""
    if bits not in range(1, 9):
        raise ValueError(f"bits is {bits}: allowed are 1 to 8")
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs the codes of each row.

    codes: (..., count) uint8, below 2**bits.

    Returns (..., packed_bytes(count, bits)) uint8. Raises ValueError for another dtype and for
    larger codes.
    """
    count = codes.shape[-1]
    width = packed_bytes(count, bits)
    _check_uint8("codes", codes)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(
            f"codes go up to {int(codes.max())}: allowed at {bits} bits are 0 to {2**bits - 1}"
        )
    slots = _groups(codes, count, 8)
    packed = slots.new_zeros(*slots.shape[:-1], bits)
    for slot in range(8):
        byte, shift = divmod(slot * bits, 8)
        packed[..., byte] |= slots[..., slot] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= slots[..., slot] >> (8 - shift)
    return packed.flatten(-2)[..., :width].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks the codes of each row.

    packed: (..., packed_bytes(count, bits)) uint8.

    Returns codes (..., count) uint8, a new tensor. Raises ValueError for another dtype or width.
    """
    width = packed_bytes(count, bits)
    _check_uint8("packed", packed)
    if packed.shape[-1] != width:
        raise ValueError(
            f"packed has {packed.shape[-1]} bytes per row: {count} codes of {bits} bits need "
            f"{width}"
        )
    codes = _gather(packed, bits, count) if bits in (3, 5, 6, 7) else _spread(packed, bits)
    return codes if codes.shape[-1] == count else codes[..., :count].contiguous()


def _spread(packed: Tensor, bits: int) -> Tensor:
    """Unpacks codes of 1, 2, 4 and 8 bits: halves every byte until each byte holds one code.

    Adding v * (2**8 - 2**half) to a word moves the upper half of its lower byte, u = v * 2**half,
    into the upper byte. Words of two bytes take two thirds of the time of shifting and masking
    (2048 x 2048, 1 to 4 bits, one CPU thread). Words are little-endian, as on every machine that
    torch supports.
    """
    if bits == 8:
        return packed.clone(memory_format=torch.contiguous_format)
    codes = packed.contiguous()
    for half in (4, 2, 1):
        if half < bits:
            break
        words = codes.to(torch.int16)
        upper = words & (2**half - 1) << half
        codes = words.add_(upper, alpha=2 ** (8 - half) - 1).view(torch.uint8)
    return codes


def _gather(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks codes of 3, 5, 6 and 7 bits: eight codes at a time, which take `bits` bytes.

    Each code is cut from one or two bytes, in uint8. That is four times as fast as with one int64
    word for the eight codes (4096 x 4096, one CPU thread).
    """
    planes = [plane.contiguous() for plane in _groups(packed, count, bits).unbind(-1)]
    codes = packed.new_empty(*planes[0].shape, 8)
    for slot in range(8):
        byte, shift = divmod(slot * bits, 8)
        code = planes[byte] >> shift
        if shift + bits > 8:
            code |= planes[byte + 1] << (8 - shift)
        codes[..., slot] = code & (2**bits - 1)
    return codes.flatten(-2)


def _groups(row: Tensor, count: int, size: int) -> Tensor:
    """Splits rows into one group for each eight codes, padded with zeros.

    row: (..., n).
    count: codes of a row.
    size: values of a group: 8 for codes, `bits` for bytes.

    Returns (..., ceil(count / 8), size).
    """
    groups = (count + 7) // 8
    return functional.pad(row, (0, groups * size - row.shape[-1])).unflatten(-1, (groups, size))


def _check_uint8(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{name} is {tensor.dtype}: allowed is torch.uint8")
