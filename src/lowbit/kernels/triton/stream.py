"""Multiplies by uniform codes of 1 to 8 bits, in the bit stream in which they are stored.

    weight = factor * scale * (code - zero_unit * zero)     or     scale * code + added

A unit is as many codes as a word has bits, 32 where rows begin at whole words, else 8. It takes
`bits` words. A code that lies within a word is multiplied where it lies, without a shift: it is
then too large by a power of two, by which `arrange` has divided the input.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.arrange import Arranged, arrange
from lowbit.kernels.triton.launch import FEW, WRITTEN, ceil_div, partial_sums, power_of_two, splits

CONSTANT, ZEROS, ADDED = 0, 1, 2  # what is subtracted from codes, or added to the product


@dataclass(frozen=True)
class Stream:
    """A weight of uniform codes.

    packed: (rows, bytes) uint8, the codes of each row as a little-endian bit stream.
    inputs: codes of a row.
    bits: width of a code.
    scale: (rows, groups) of a float dtype.
    group_size: inputs of a group; the last one of a row may be shorter.
    zero: (rows, groups) of any dtype, in units of zero_unit; None: all are middle.
    middle: the zero point, in units of zero_unit, where `zero` is None.
    zero_unit, factor: see the module's docstring.
    added: (rows, groups) float; then there is no zero and no factor.
    columns: (inputs,) float, by which the columns of the weight are multiplied; None: 1.
    """

    packed: Tensor
    inputs: int
    bits: int
    scale: Tensor
    group_size: int
    zero: Tensor | None = None
    middle: float = 0.0
    zero_unit: float = 1.0
    factor: float = 1.0
    added: Tensor | None = None
    columns: Tensor | None = None

    @property
    def kind(self) -> int:
        return ADDED if self.added is not None else CONSTANT if self.zero is None else ZEROS

    @property
    def subtracted(self) -> Tensor:
        """The tensor of zeros or added numbers, or any tensor if there is none."""
        found = self.zero if self.added is None else self.added
        return self.scale if found is None else found

    @property
    def word(self) -> int:
        """Bits of the words in which the codes are read; 0: groups do not consist of units."""
        size, whole = self.packed.shape[1], self.group_size >= self.inputs
        aligned = size % 4 == 0 and self.packed.data_ptr() % 4 == 0
        for word in (32, 8) if aligned else (8,):
            if whole or self.group_size % word == 0:
                return word
        return 0


def few(x: Tensor, weight: Stream, order: Tensor | None = None) -> Tensor:
    """Multiplies a few tokens: (tokens, any) -> sums of the parts (parts, tokens, rows) float32.

    `launch.total` adds the parts.

    x: (tokens, inputs) of a float dtype, at most MOST_FEW tokens.
    order: (weight.inputs,), the input that each column of the weight is for; None: in order.
    weight: one whose `word` is not 0.
    """
    word = weight.word
    given = arrange(x, word, order=order, factor=weight.columns, bits=weight.bits)
    return _few(given, weight, word)


def _few(x: Arranged, weight: Stream, word: int) -> Tensor:
    rows, size = weight.packed.shape
    tokens = power_of_two(x.tokens)
    tile = FEW[tokens]
    programs, blocks = ceil_div(rows, tile.rows), ceil_div(x.units, tile.units)
    parts = splits(programs, blocks)
    sums = partial_sums(parts, x.tokens, rows, x.values.device)
    packed = weight.packed.contiguous()
    groups = weight.scale.shape[1]
    _multiply[programs, parts](
        x.values, x.sums, packed.view(torch.int32) if word == 32 else packed,
        weight.scale, weight.subtracted, sums,
        x.tokens, rows, x.units, size * 8 // word, groups,
        x.units if groups == 1 else weight.group_size // word, ceil_div(blocks, parts),
        weight.factor, weight.zero_unit, weight.middle,
        BITS=weight.bits, WORD=word, KIND=weight.kind, TOKENS=tokens, ROWS=tile.rows,
        UNITS=tile.units, num_warps=tile.warps,
    )  # fmt: skip
    return sums


@triton.jit
def _within(word, PLACE: tl.constexpr, BITS: tl.constexpr):
    """The code at a bit of a word, times 2**PLACE."""
    return (word & (((1 << BITS) - 1) << PLACE)).to(tl.float32)


@triton.jit
def _across(before, word, PLACE: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr):
    """The code that begins at a bit of the word before."""
    code = (before >> PLACE) | (word << (WORD - PLACE))
    return (code & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _multiply(
    x, x_sums, packed, scale, subtracted, sums,
    tokens, rows, units, row_words, groups, group_units, part_blocks,
    factor, zero_unit, middle,
    BITS: tl.constexpr, WORD: tl.constexpr, KIND: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    t = tl.arange(0, TOKENS)
    long_row = row.to(tl.int64)
    total = tl.zeros((TOKENS, ROWS, UNITS), dtype=tl.float32)
    for block in range(part * part_blocks, (part + 1) * part_blocks):
        u = block * UNITS + tl.arange(0, UNITS)
        here = (row < rows)[:, None] & (u < units)[None, :]
        seen = (t < tokens)[:, None] & (u < units)[None, :]
        places = packed + long_row[:, None] * row_words + u[None, :] * BITS
        product = tl.zeros((TOKENS, ROWS, UNITS), dtype=tl.float32)
        before = tl.zeros((ROWS, UNITS), dtype=tl.uint32)
        for i in tl.static_range(BITS):
            inside = here & (u * BITS + i < row_words)[None, :]
            word = tl.load(places + i, mask=inside, other=0).to(tl.uint32)
            for j in tl.static_range(WORD):
                if (j * BITS) // WORD == i:
                    if (j * BITS) % WORD + BITS <= WORD:
                        value = tl.load(
                            x + (t[:, None] * WORD + j) * units + u[None, :], mask=seen, other=0.0
                        )
                        code = _within(word, (j * BITS) % WORD, BITS)
                        product += code[None, :, :] * value[:, None, :]
                if (j * BITS) // WORD == i - 1:
                    if (j * BITS) % WORD + BITS > WORD:
                        value = tl.load(
                            x + (t[:, None] * WORD + j) * units + u[None, :], mask=seen, other=0.0
                        )
                        code = _across(before, word, (j * BITS) % WORD, BITS, WORD)
                        product += code[None, :, :] * value[:, None, :]
            before = word
        of_unit = tl.load(x_sums + t[:, None] * units + u[None, :], mask=seen, other=0.0)
        group = long_row[:, None] * groups + (u // group_units)[None, :]
        step = tl.load(scale + group, mask=here, other=0.0).to(tl.float32) * factor
        if KIND == 0:
            product -= middle * zero_unit * of_unit[:, None, :]
            total += step[None, :, :] * product
        else:
            number = tl.load(subtracted + group, mask=here, other=0).to(tl.float32)
            if KIND == 1:
                product -= (number * zero_unit)[None, :, :] * of_unit[:, None, :]
                total += step[None, :, :] * product
            else:
                total += step[None, :, :] * product
                total += number[None, :, :] * of_unit[:, None, :]
    out = sums + (part * tokens + t[:, None]).to(tl.int64) * rows + row[None, :]
    tl.store(out, tl.sum(total, 2), mask=(t < tokens)[:, None] & (row < rows)[None, :])


def write(into: Tensor, weight: Stream) -> None:
    """Writes a weight. into: (rows, inputs) of a float dtype, neighbouring inputs side by side."""
    rows, inputs = into.shape
    groups, size = weight.scale.shape[1], weight.packed.shape[1]
    grid = (ceil_div(rows, WRITTEN.rows), ceil_div(inputs, WRITTEN.units))
    _write[grid](
        weight.packed.contiguous(), weight.scale, weight.subtracted,
        into if weight.columns is None else weight.columns, into,
        rows, inputs, size, groups, inputs if groups == 1 else weight.group_size, into.stride(0),
        weight.factor, weight.zero_unit, weight.middle,
        BITS=weight.bits, KIND=weight.kind, COLUMNS=weight.columns is not None,
        ROWS=WRITTEN.rows, INPUTS=WRITTEN.units, num_warps=WRITTEN.warps,
    )  # fmt: skip


@triton.jit
def code_at(packed, row, k, row_bytes, inside, BITS: tl.constexpr):
    """Returns the code of input k of a row: int32.

    packed: pointer to uint8.
    row: int64. row, k, inside: of shapes that broadcast to that of the result.
    """
    bit = k * BITS
    place = packed + row * row_bytes + bit // 8
    code = tl.load(place, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        more = inside & (bit // 8 + 1 < row_bytes)
        code |= tl.load(place + 1, mask=more, other=0).to(tl.int32) << 8
    return (code >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def _write(
    packed, scale, subtracted, columns, out,
    rows, inputs, row_bytes, groups, group_size, stride,
    factor, zero_unit, middle,
    BITS: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * INPUTS + tl.arange(0, INPUTS))[None, :]
    inside = (row < rows) & (k < inputs)
    code = code_at(packed, row, k, row_bytes, inside, BITS).to(tl.float32)
    group = row * groups + k // group_size
    step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32) * factor
    if KIND == 0:
        value = step * (code - middle * zero_unit)
    else:
        number = tl.load(subtracted + group, mask=inside, other=0).to(tl.float32)
        if KIND == 1:
            value = step * (code - number * zero_unit)
        else:
            value = step * code + number
    if COLUMNS:
        value = value * tl.load(columns + k, mask=k < inputs, other=0.0).to(tl.float32)
    tl.store(out + row * stride + k, value.to(out.dtype.element_ty), mask=inside)
