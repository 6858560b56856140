"""Products of rounded inputs with uniform codes: exact integer sums, group by group.

    y = sum over groups of scale_x * scale * (sum over the group of q * (code - 2**(bits - 1)))
        + sum over salient inputs of x * salient

Codes of inputs and weights are int8, which matrix units multiply and add up in int32.
formats/sorted_group explains the numbers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.launch import (
    MOST_FEW,
    ceil_div,
    partial_sums,
    power_of_two,
    splits,
    total,
)
from lowbit.kernels.triton.rounding import nearest_even
from lowbit.kernels.triton.stream import code_at

ROWS = 64  # rows of the weight in a program
TOKENS = {True: 16, False: 64}  # tokens of a program, by whether there are a few only
LEAST, MOST = 32, 128  # inputs of a step; the matrix units take 32 codes of int8 at least
SALIENT = 16  # salient inputs of a step


@dataclass(frozen=True)
class Codes:
    """A weight of codes, and of numbers for salient inputs.

    packed: (rows, bytes) uint8, the codes of each row as a little-endian bit stream.
    kept: codes of a row.
    bits: width of a code.
    scale: (rows, groups) of a float dtype.
    group_size: inputs of a group.
    salient: (rows, salient) of a float dtype or int8; None: there are no salient inputs.
    salient_scale: (rows,), the scale of codes in `salient`; None: they are weights.
    """

    packed: Tensor
    kept: int
    bits: int
    scale: Tensor
    group_size: int
    salient: Tensor | None
    salient_scale: Tensor | None


def rounded_groups(x: Tensor, kept: int, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Rounds each group of each token with a scale of its own, ties to even.

    x: (tokens, inputs) of a float dtype; only the first `kept` inputs are rounded.
    bits: width of a code.

    Returns codes (tokens, kept) int8 and scales (tokens, groups) float32.
    """
    x, groups = x.contiguous(), ceil_div(kept, group_size)
    codes = torch.empty(len(x), kept, dtype=torch.int8, device=x.device)
    scales = torch.empty(len(x), groups, dtype=torch.float32, device=x.device)
    block = min(1024, power_of_two(min(group_size, kept)))
    _round_groups[len(x), groups](
        x, codes, scales, x.shape[1], kept, group_size, groups, TOP=2 ** (bits - 1) - 1, BLOCK=block
    )
    return codes, scales


@triton.jit
def _round_groups(
    x, codes, scales, inputs, kept, group_size, groups, TOP: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    stop = tl.minimum((group + 1) * group_size, kept)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(group * group_size, stop, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(x + token * inputs + k, mask=k < stop, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    step = tl.div_rn(tl.max(largest, 0), tl.full((), TOP, tl.float32))
    tl.store(scales + token * groups + group, step)
    divisor = tl.zeros((BLOCK,), tl.float32) + tl.where(step == 0, float("inf"), step)
    for first in range(group * group_size, stop, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(x + token * inputs + k, mask=k < stop, other=0.0).to(tl.float32)
        code = nearest_even(tl.div_rn(value, divisor))
        code = tl.minimum(tl.maximum(code, -TOP), TOP)
        tl.store(codes + token * kept + k, code.to(tl.int8), mask=k < stop)


def multiply(x: Tensor, weight: Codes, input_bits: int) -> Tensor:
    """Multiplies: (tokens, inputs) -> (tokens, rows) float32.

    x: of a float dtype, the kept inputs first, then the salient ones.
    input_bits: to how many bits the kept inputs are rounded.
    """
    x = x.contiguous()
    codes, scales = rounded_groups(x, weight.kept, input_bits, weight.group_size)
    rows, size = weight.packed.shape
    few = len(x) <= MOST_FEW
    tokens, groups = TOKENS[few], scales.shape[1]
    programs = ceil_div(len(x), tokens), ceil_div(rows, ROWS)
    parts = splits(programs[0] * programs[1], groups)
    sums = partial_sums(parts, len(x), rows, x.device)
    salient, salient_scale = weight.salient, weight.salient_scale
    _multiply[*programs, parts](
        x, codes, scales, weight.packed.contiguous(), weight.scale.contiguous(),
        weight.scale if salient is None else salient.contiguous(),
        weight.scale if salient_scale is None else salient_scale, sums,
        len(x), rows, x.shape[1], weight.kept, size, groups, weight.group_size,
        0 if salient is None else salient.shape[1], ceil_div(groups, parts),
        BITS=weight.bits, SCALED=salient_scale is not None, TOKENS=tokens, ROWS=ROWS,
        INPUTS=max(LEAST, min(MOST, power_of_two(weight.group_size))), SALIENT=SALIENT,
    )  # fmt: skip
    return total(sums)


@triton.jit
def _multiply(
    x, codes, scales, packed, scale, salient, salient_scale, sums,
    tokens, rows, inputs, kept, row_bytes, groups, group_size, salient_count, part_groups,
    BITS: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    INPUTS: tl.constexpr, SALIENT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    token, long_row = t.to(tl.int64)[:, None], row.to(tl.int64)[None, :]
    seen, here = t < tokens, row < rows
    product = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for group in range(part * part_groups, tl.minimum((part + 1) * part_groups, groups)):
        stop = tl.minimum((group + 1) * group_size, kept)
        whole = tl.zeros((TOKENS, ROWS), dtype=tl.int32)
        for first in range(group * group_size, stop, INPUTS):
            k = first + tl.arange(0, INPUTS)
            given = tl.load(
                codes + token * kept + k[None, :], mask=seen[:, None] & (k < stop)[None, :], other=0
            )
            inside = (k < stop)[:, None] & here[None, :]
            code = code_at(packed, long_row, k[:, None], row_bytes, inside, BITS)
            code = (code - (1 << (BITS - 1))).to(tl.int8)
            whole = tl.dot(given, code, whole)
        of_input = tl.load(scales + t.to(tl.int64) * groups + group, mask=seen, other=0.0)
        step = tl.load(scale + row.to(tl.int64) * groups + group, mask=here, other=0.0)
        product += whole.to(tl.float32) * of_input[:, None] * step.to(tl.float32)[None, :]
    # Salient inputs are multiplied with the first part.
    beside = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for first in range(0, tl.where(part == 0, salient_count, 0), SALIENT):
        s = first + tl.arange(0, SALIENT)
        seen_s = seen[:, None] & (s < salient_count)[None, :]
        given = tl.load(x + token * inputs + kept + s[None, :], mask=seen_s, other=0.0)
        inside = (s < salient_count)[:, None] & here[None, :]
        weight = tl.load(salient + long_row * salient_count + s[:, None], mask=inside, other=0)
        beside = tl.dot(given.to(tl.float32), weight.to(tl.float32), beside, input_precision="ieee")
    if SCALED:
        step = tl.load(salient_scale + row, mask=here, other=0.0).to(tl.float32)
        beside = beside * step[None, :]
    out = sums + (part * tokens + token) * rows + row[None, :]
    tl.store(out, product + beside, mask=seen[:, None] & here[None, :])
