"""Codes of 1 to 8 bits in bytes.

Each row is a little-endian bit stream of its own: code j occupies bits [j * bits, (j + 1) * bits),
low bits first, and bit i of the row is bit i % 8 of its byte i // 8. A row of `count` codes takes
ceil(count * bits / 8) bytes; the bits left over in its last byte are zero.
"""

import torch
from torch import Tensor
from torch.nn import functional

# bits: the word that holds the codes of one byte, one code to a byte, and how they get there: in
# each step half of the codes still lying together move up by `shift`, and `mask` drops the copies.
# The words are little-endian, as every machine that torch runs on is.
_SPREAD = {
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    4: (torch.int16, ((4, 0x0F0F),)),
    8: (torch.uint8, ()),
}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    if bits not in range(1, 9):
        raise ValueError(f"bits is {bits}: allowed are 1 to 8")
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: (..., count) uint8 below 2**bits  ->  (..., packed_bytes(count, bits)) uint8"""
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
    """packed: (..., packed_bytes(count, bits)) uint8  ->  codes (..., count) uint8, a new tensor"""
    width = packed_bytes(count, bits)
    _check_uint8("packed", packed)
    if packed.shape[-1] != width:
        raise ValueError(
            f"packed has {packed.shape[-1]} bytes a row: {count} codes of {bits} bits take {width}"
        )
    codes = _spread(packed, bits) if bits in _SPREAD else _gather(packed, bits, count)
    return codes[..., :count].contiguous()


def _spread(packed: Tensor, bits: int) -> Tensor:
    """Codes that straddle no byte, a byte's codes at a time: twice as fast as slot by slot."""
    word, steps = _SPREAD[bits]
    codes = packed.to(word, copy=True, memory_format=torch.contiguous_format)
    for shift, mask in steps:
        codes.bitwise_or_(codes << shift).bitwise_and_(mask)
    return codes.view(torch.uint8)


def _gather(packed: Tensor, bits: int, count: int) -> Tensor:
    """Eight codes lie in `bits` bytes; each slot is cut from at most two of them, in uint8.

    Four times as fast as through one int64 word for the eight (4096 x 4096, one CPU thread).
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
    """(..., n)  ->  (..., ceil(count / 8), size): what stands for eight codes, zeros at the end"""
    groups = (count + 7) // 8
    return functional.pad(row, (0, groups * size - row.shape[-1])).unflatten(-1, (groups, size))


def _check_uint8(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{name} is {tensor.dtype}: allowed is torch.uint8")
