"""Multiplies by trellis codes, decoded as they are stored; formats/trellis explains them.

A tile of 16 x 16 weights is a ring of words of 32 bits. A state is cut from one or two of them. Its
value is the sum of the lower 6 bits of the four bytes of a product; multiplying by 0x01010101 adds
the bytes, whose sum is at most 252.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.arrange import arrange
from lowbit.kernels.triton.launch import FEW, ceil_div, partial_sums, power_of_two, splits

TILE = 16  # rows and columns of a tile
ACROSS = {1: 32, 2: 32, 4: 32, 8: 16, 16: 16}  # tiles of a program's step, by tokens
WRITTEN = 8  # tiles that a program writes


@dataclass(frozen=True)
class Trellis:
    """A weight of trellis codes.

    packed: (strips, tiles, bytes) uint8.
    scale: (rows,) float32, by which the values of a row are multiplied.
    inputs: columns of the weight.
    state_bits, shift, values: bits of a state and of a step, and weights of a step, 1 or 2.
    multipliers: one for each value of a step.
    """

    packed: Tensor
    scale: Tensor
    inputs: int
    state_bits: int
    shift: int
    values: int
    multipliers: tuple[int, int]

    def words(self) -> Tensor:
        """Returns the bits of the tiles: (strips, tiles, words) int32."""
        packed = self.packed.contiguous()
        aligned = packed if packed.data_ptr() % 4 == 0 else packed.clone()
        return aligned.view(torch.int32)


def few(x: Tensor, weight: Trellis) -> Tensor:
    """Multiplies a few tokens: (tokens, inputs) -> sums of the parts (parts, tokens, rows) float32.

    `launch.total` adds the parts.

    x: of a float dtype, at most MOST_FEW tokens.
    """
    given, rows, packed = arrange(x, TILE), len(weight.scale), weight.words()
    tokens = power_of_two(given.tokens)
    blocks = ceil_div(packed.shape[1], ACROSS[tokens])
    parts = splits(len(packed), blocks)
    sums = partial_sums(parts, given.tokens, rows, x.device)
    _multiply[len(packed), parts](
        given.values, packed, weight.scale, sums,
        given.tokens, rows, given.units, ceil_div(blocks, parts),
        *weight.multipliers,
        WORDS=packed.shape[2], STATE=weight.state_bits, SHIFT=weight.shift, VALUES=weight.values,
        TOKENS=tokens, ACROSS=ACROSS[tokens], num_warps=FEW[tokens].warps,
    )  # fmt: skip
    return sums


@triton.jit
def _values(
    place, step, first, second, one, inside,
    WORDS: tl.constexpr, STATE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The values of steps in float32: `second` where `one`, else `first`.

    place: pointers to the first words of tiles.
    step: the number of the step in its tile.
    first, second: multipliers.
    """
    bit = step * SHIFT
    word, offset = bit // 32, bit % 32
    low = tl.load(place + word, mask=inside, other=0).to(tl.uint32)
    high = tl.load(place + (word + 1) % WORDS, mask=inside, other=0).to(tl.uint32)
    # Two shifts, because a shift by 32 is not defined.
    window = (low >> offset.to(tl.uint32)) | (high << 1 << (31 - offset).to(tl.uint32))
    state = window & ((1 << STATE) - 1)
    mixed = state * tl.where(one, second.to(tl.uint32), first.to(tl.uint32))
    bytes_sum = ((mixed & 0x3F3F3F3F) * 0x01010101) >> 24
    return bytes_sum.to(tl.float32) - 126.0


@triton.jit
def _multiply(
    x, packed, scale, sums,
    tokens, rows, tiles, part_blocks, first, second,
    WORDS: tl.constexpr, STATE: tl.constexpr, SHIFT: tl.constexpr, VALUES: tl.constexpr,
    TOKENS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    part = tl.program_id(1)
    r = tl.arange(0, 16)[:, None]
    t = tl.arange(0, TOKENS)[:, None]
    total = tl.zeros((TOKENS, 16, ACROSS), dtype=tl.float32)
    for block in range(part * part_blocks, (part + 1) * part_blocks):
        tile = (block * ACROSS + tl.arange(0, ACROSS))[None, :]
        place = packed + (strip.to(tl.int64) * tiles + tile) * WORDS
        seen = (t < tokens) & (tile < tiles)
        for column in tl.static_range(16):
            here = (tile < tiles) & (r < 16)
            if VALUES == 1:
                value = _values(
                    place, column * 16 + r, first, first, r < 0, here, WORDS, STATE, SHIFT
                )
            else:
                value = _values(
                    place, (column % 8) * 16 + r, first, second, (r + column * 16) >= 128, here,
                    WORDS, STATE, SHIFT,
                )  # fmt: skip
            given = tl.load(x + (t * 16 + column) * tiles + tile, mask=seen, other=0.0)
            total += value[None, :, :] * given[:, None, :]
    row = strip * 16 + tl.arange(0, 16)
    step = tl.load(scale + row, mask=row < rows, other=0.0)
    product = tl.sum(total, 2) * step[None, :]
    out = sums + (part * tokens + t).to(tl.int64) * rows + row[None, :]
    tl.store(out, product, mask=(t < tokens) & (row < rows)[None, :])


def write(into: Tensor, weight: Trellis) -> None:
    """Writes a weight. into: (rows, inputs) of a float dtype, neighbouring inputs side by side."""
    packed, (rows, inputs) = weight.words(), into.shape
    grid = (len(packed), ceil_div(packed.shape[1], WRITTEN))
    _write[grid](
        packed, weight.scale, into, rows, inputs, packed.shape[1], into.stride(0),
        *weight.multipliers,
        WORDS=packed.shape[2], STATE=weight.state_bits, SHIFT=weight.shift, VALUES=weight.values,
        INPUTS=16 * WRITTEN,
    )  # fmt: skip


@triton.jit
def _write(
    packed, scale, out, rows, inputs, tiles, stride, first, second,
    WORDS: tl.constexpr, STATE: tl.constexpr, SHIFT: tl.constexpr, VALUES: tl.constexpr,
    INPUTS: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, 16)[:, None]
    k = (tl.program_id(1) * INPUTS + tl.arange(0, INPUTS))[None, :]
    row = strip * 16 + r
    inside = (row < rows) & (k < inputs)
    place = packed + (strip * tiles + k // 16) * WORDS
    position = (k % 16) * 16 + r
    step = position % (256 // VALUES)
    one = position >= 256 // VALUES
    value = _values(place, step, first, second, one, inside, WORDS, STATE, SHIFT)
    value = value * tl.load(scale + row, mask=row < rows, other=0.0)
    tl.store(out + row * stride + k, value.to(out.dtype.element_ty), mask=inside)
