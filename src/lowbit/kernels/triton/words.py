"""Multiplies by words of a lattice, as they are stored.

    weight = scale * (first word + factor * second word)

A word of E8P12 is decoded from the 16 bits of its code and a table of 256 patterns; a word of a
listed codebook from a table with 4 bits for each coordinate. A table takes 1 KiB, which stays in
the first-level cache.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.arrange import arrange
from lowbit.kernels.triton.launch import FEW, WRITTEN, ceil_div, partial_sums, power_of_two, splits

E8P_BITS, LISTED_BITS = 16, 8  # of a code


@dataclass(frozen=True)
class Book:
    """The words of a stage.

    table: (256,) int32. Of E8P12: the magnitudes of a pattern minus 1/2, in two bits each, the
        first lowest, and in bit 16 the parity of their sum. Of a listed codebook: the coordinates
        of a word as numbers of 4 bits, the first lowest.
    step, low: a coordinate of a listed codebook is step * number + low; a step of 0 means E8P12.
    """

    table: Tensor
    step: float = 0.0
    low: float = 0.0

    @property
    def listed(self) -> bool:
        return self.step != 0

    @property
    def bits(self) -> int:
        return LISTED_BITS if self.listed else E8P_BITS


@dataclass(frozen=True)
class Words:
    """A weight of words.

    packed: (rows, bytes) uint8, the codes of each row.
    inputs: columns of the weight; the last word may extend beyond them.
    dim: coordinates of a word, 4 or 8.
    scale: (rows,) or (1,) of a float dtype.
    first, second: the stages; the code of the second has the upper bits.
    factor: of the second stage.
    """

    packed: Tensor
    inputs: int
    dim: int
    scale: Tensor
    first: Book
    second: Book | None = None
    factor: float = 0.0

    @property
    def code_bytes(self) -> int:
        return (self.first.bits + (0 if self.second is None else self.second.bits)) // 8

    def arguments(self) -> tuple[Tensor, Tensor, float, float, float]:
        """Returns the tables, and of a listed stage the step and the low, and the factor."""
        second = self.second or self.first
        listed = self.first if self.first.listed else second
        return self.first.table, second.table, listed.step, listed.low, self.factor


def few(x: Tensor, weight: Words) -> Tensor:
    """Multiplies a few tokens: (tokens, inputs) -> sums of the parts (parts, tokens, rows) float32.

    `launch.total` adds the parts.

    x: of a float dtype, at most MOST_FEW tokens.
    """
    given, rows = arrange(x, weight.dim), len(weight.packed)
    tokens = power_of_two(given.tokens)
    tile = FEW[tokens]
    programs, blocks = ceil_div(rows, tile.rows), ceil_div(given.units, tile.units)
    parts = splits(programs, blocks)
    sums = partial_sums(parts, given.tokens, rows, x.device)
    _multiply[programs, parts](
        given.values, given.sums, weight.packed.contiguous(), weight.scale, sums,
        *weight.arguments(),
        given.tokens, rows, given.units, weight.packed.shape[1], ceil_div(blocks, parts),
        DIM=weight.dim, BYTES=weight.code_bytes, LISTED=weight.first.listed,
        SECOND_LISTED=weight.second is not None and weight.second.listed,
        ROW_SCALES=len(weight.scale) > 1, TOKENS=tokens, ROWS=tile.rows, WORDS=tile.units,
        num_warps=tile.warps,
    )  # fmt: skip
    return sums


@triton.jit
def _byte(place, number, inside):
    return tl.load(place + number, mask=inside, other=0).to(tl.int32)


@triton.jit
def _e8p_signs(code, pattern):
    """The signs of the eight coordinates, a bit each; that of the last follows from parities."""
    minus = code & 127
    odd = minus ^ (minus >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1) ^ (pattern >> 16)) & 1
    return minus | (odd << 7)


@triton.jit
def _e8p_shift(code):
    return 0.25 - 0.5 * ((code >> 7) & 1).to(tl.float32)


@triton.jit
def _e8p_coordinate(signs, pattern, i):
    """Coordinate i of a word without its shift."""
    size = ((pattern >> (2 * i)) & 3).to(tl.float32) + 0.5
    return tl.where(((signs >> i) & 1) == 1, -size, size)


@triton.jit
def _e8p_products(code, patterns, x, units, t, u, sums, seen, DIM: tl.constexpr):
    """Products of words with inputs: (tokens, rows, words)."""
    pattern = tl.load(patterns + ((code >> 8) & 255))
    signs = _e8p_signs(code, pattern)
    product = _e8p_shift(code)[None, :, :] * sums[:, None, :]
    for i in tl.static_range(DIM):
        value = tl.load(x + (t * DIM + i) * units + u, mask=seen, other=0.0)
        product += _e8p_coordinate(signs, pattern, i)[None, :, :] * value[:, None, :]
    return product


@triton.jit
def _listed_products(code, table, step, low, x, units, t, u, sums, seen, DIM: tl.constexpr):
    numbers = tl.load(table + (code & 255))
    product = tl.zeros((t.shape[0], code.shape[0], code.shape[1]), dtype=tl.float32)
    for i in tl.static_range(DIM):
        value = tl.load(x + (t * DIM + i) * units + u, mask=seen, other=0.0)
        number = ((numbers >> (4 * i)) & 15).to(tl.float32)
        product += number[None, :, :] * value[:, None, :]
    return step * product + low * sums[:, None, :]


@triton.jit
def _multiply(
    x, x_sums, packed, scale, sums,
    table, second, step, low, factor,
    tokens, rows, units, row_bytes, part_blocks,
    DIM: tl.constexpr, BYTES: tl.constexpr, LISTED: tl.constexpr, SECOND_LISTED: tl.constexpr,
    ROW_SCALES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    t = tl.arange(0, TOKENS)[:, None]
    total = tl.zeros((TOKENS, ROWS, WORDS), dtype=tl.float32)
    for block in range(part * part_blocks, (part + 1) * part_blocks):
        u = (block * WORDS + tl.arange(0, WORDS))[None, :]
        here = (row < rows)[:, None] & (u < units)
        seen = (t < tokens) & (u < units)
        of_word = tl.load(x_sums + t * units + u, mask=seen, other=0.0)
        place = packed + row.to(tl.int64)[:, None] * row_bytes + u * BYTES
        code = _byte(place, 0, here)
        if LISTED:
            total += _listed_products(code, table, step, low, x, units, t, u, of_word, seen, DIM)
        else:
            code |= _byte(place, 1, here) << 8
            total += _e8p_products(code, table, x, units, t, u, of_word, seen, DIM)
        if BYTES > 2:
            more = _byte(place, 2, here)
            if SECOND_LISTED:
                total += factor * _listed_products(
                    more, second, step, low, x, units, t, u, of_word, seen, DIM
                )
            else:
                more |= _byte(place, 3, here) << 8
                total += factor * _e8p_products(more, second, x, units, t, u, of_word, seen, DIM)
    product = tl.sum(total, 2)
    if ROW_SCALES:
        product = product * tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    else:
        product = product * tl.load(scale).to(tl.float32)
    out = sums + (part * tokens + t).to(tl.int64) * rows + row[None, :]
    tl.store(out, product, mask=(t < tokens) & (row < rows)[None, :])


def write(into: Tensor, weight: Words) -> None:
    """Writes a weight. into: (rows, inputs) of a float dtype, neighbouring inputs side by side."""
    rows, inputs = into.shape
    grid = (ceil_div(rows, WRITTEN.rows), ceil_div(inputs, WRITTEN.units))
    _write[grid](
        weight.packed.contiguous(), weight.scale, into, *weight.arguments(),
        rows, inputs, weight.packed.shape[1], into.stride(0),
        DIM=weight.dim, BYTES=weight.code_bytes, LISTED=weight.first.listed,
        SECOND_LISTED=weight.second is not None and weight.second.listed,
        ROW_SCALES=len(weight.scale) > 1, ROWS=WRITTEN.rows, INPUTS=WRITTEN.units,
        num_warps=WRITTEN.warps,
    )  # fmt: skip


@triton.jit
def _e8p_values(code, patterns, i):
    pattern = tl.load(patterns + ((code >> 8) & 255))
    return _e8p_coordinate(_e8p_signs(code, pattern), pattern, i) + _e8p_shift(code)


@triton.jit
def _listed_values(code, table, step, low, i):
    return ((tl.load(table + (code & 255)) >> (4 * i)) & 15).to(tl.float32) * step + low


@triton.jit
def _write(
    packed, scale, out, table, second, step, low, factor,
    rows, inputs, row_bytes, stride,
    DIM: tl.constexpr, BYTES: tl.constexpr, LISTED: tl.constexpr, SECOND_LISTED: tl.constexpr,
    ROW_SCALES: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * INPUTS + tl.arange(0, INPUTS))[None, :]
    inside = (row < rows) & (k < inputs)
    place, i = packed + row * row_bytes + k // DIM * BYTES, k % DIM
    code = _byte(place, 0, inside)
    if LISTED:
        value = _listed_values(code, table, step, low, i)
    else:
        code |= _byte(place, 1, inside) << 8
        value = _e8p_values(code, table, i)
    if BYTES > 2:
        more = _byte(place, 2, inside)
        if SECOND_LISTED:
            value = factor * _listed_values(more, second, step, low, i) + value
        else:
            more |= _byte(place, 3, inside) << 8
            value = factor * _e8p_values(more, second, i) + value
    if ROW_SCALES:
        value = value * tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)
    else:
        value = value * tl.load(scale).to(tl.float32)
    tl.store(out + row * stride + k, value.to(out.dtype.element_ty), mask=inside)
