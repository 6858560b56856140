"""The orthogonal transforms of `lowbit.kernels.hadamard`, in one kernel.

A row is viewed as K x p. The kernel multiplies by M along K, and then by the Sylvester matrix along
p with additions and subtractions. A program computes some rows of M for one token, or for as many
as fill the 16 columns that a product needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.launch import ceil_div

ORDERS = 16  # rows and columns of M in a step
LARGEST_ORDER = 256  # of M; with more, torch's products are faster
SHARED = 2**16  # bytes of shared memory that a program may take; every GPU has so many


def fits(n: int, power: int) -> bool:
    """Whether the kernel computes a transform. n: width, power: p."""
    order = n // power
    values = power if order == 1 else ORDERS * max(power, ORDERS)
    shared = 4 * values if order == 1 else 8 * values  # as the compiler states them
    return order <= LARGEST_ORDER and shared <= SHARED


def transform(
    x: Tensor,
    power: int,
    matrix: Tensor | None,
    scale: float,
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Computes after * scale * (M (x) I)(I (x) H)(before * x) for each token, in float32.

    x: (..., n) of a float dtype.
    power: rows of the Sylvester matrix H of 1 and -1; a power of two that divides n.
    matrix: M, (n / power, n / power) of a float dtype; None: 1, and n is the power.
    before, after: (n,) of a float dtype; None: 1.

    Returns (..., n) float32, contiguous.
    """
    x, n = x.contiguous(), x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    tokens, order = x.numel() // n, n // power
    together = 1 if matrix is None else max(1, ORDERS // power)
    rows = 1 if matrix is None else ORDERS
    values = rows * together * power
    _transform[ceil_div(tokens, together), ceil_div(order, rows)](
        x, out, x if matrix is None else matrix.contiguous(),
        x if before is None else before.contiguous(), x if after is None else after.contiguous(),
        tokens, n, order, scale,
        POWER=power, TOGETHER=together, ROWS=rows, STAGES=power.bit_length() - 1,
        MATRIX=matrix is not None, BEFORE=before is not None, AFTER=after is not None,
        num_warps=min(16, max(4, values // 2048)),
    )  # fmt: skip
    return out


@triton.jit
def _stage(values, COUNT: tl.constexpr, HALF: tl.constexpr):
    """Adds and subtracts the numbers that are HALF apart. (COUNT,) -> (COUNT,)"""
    pairs = tl.permute(tl.reshape(values, (COUNT // (2 * HALF), 2, HALF)), (0, 2, 1))
    one, other = tl.split(pairs)
    joined = tl.permute(tl.join(one + other, one - other), (0, 2, 1))
    return tl.reshape(joined, (COUNT,))


@triton.jit
def _transform(
    x, out, matrix, before, after,
    tokens, n, order, scale,
    POWER: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    MATRIX: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, TOGETHER * POWER)[None, :]
    token = (tl.program_id(0) * TOGETHER + column // POWER).to(tl.int64)
    i = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    p = column % POWER
    if MATRIX:
        values = tl.zeros((ROWS, TOGETHER * POWER), dtype=tl.float32)
        for first in range(0, order, 16):
            k = first + tl.arange(0, 16)
            inside = (i < order) & (k < order)[None, :]
            part = tl.load(matrix + i * order + k[None, :], mask=inside, other=0.0).to(tl.float32)
            place = k[:, None] * POWER + p
            seen = (token < tokens) & (k < order)[:, None]
            given = tl.load(x + token * n + place, mask=seen, other=0.0).to(tl.float32)
            if BEFORE:
                given = given * tl.load(before + place, mask=seen, other=0.0).to(tl.float32)
            values = tl.dot(part, given, values, input_precision="ieee")
    else:
        values = tl.load(x + token * n + p, mask=token < tokens, other=0.0).to(tl.float32)
        if BEFORE:
            values = values * tl.load(before + p).to(tl.float32)
    flat = tl.reshape(values, (ROWS * TOGETHER * POWER,))
    for stage in tl.static_range(STAGES):
        flat = _stage(flat, ROWS * TOGETHER * POWER, 1 << stage)
    values = tl.reshape(flat, (ROWS, TOGETHER * POWER)) * scale
    place = i * POWER + p
    inside = (token < tokens) & (i < order)
    if AFTER:
        values = values * tl.load(after + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * n + place, values, mask=inside)
