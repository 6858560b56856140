"""Orders inputs as the products of a few tokens read them.

Threads that stand beside each other hold weights of neighbouring units, for example of words of 32
codes. They multiply the first codes of all units at the same time, then the second codes, and so
on. So the inputs of the first codes must lie beside each other.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.launch import ceil_div

BLOCK = 128  # units of a program


@dataclass(frozen=True)
class Arranged:
    """Inputs in the order of a product.

    values: (tokens, unit, units) float32; values[t, j, u] belongs to input u * unit + j. Inputs
        that fill the last unit are 0.
    sums: (tokens, units) float32, the sum of the inputs of each unit.
    """

    values: Tensor
    sums: Tensor

    @property
    def tokens(self) -> int:
        return self.values.shape[0]

    @property
    def units(self) -> int:
        return self.values.shape[2]


def arrange(
    x: Tensor,
    unit: int,
    *,
    order: Tensor | None = None,
    factor: Tensor | None = None,
    bits: int = 0,
) -> Arranged:
    """Orders inputs by their place in a unit.

    x: (tokens, inputs) of a float dtype, with neighbouring inputs beside each other.
    unit: inputs of a unit.
    order: (count,) int32 or int64, the input at each position; None: all inputs in their order.
    factor: (count,), by which each input is multiplied; None: 1.
    bits: width of the codes that stream.py multiplies where they lie in a word of `unit` bits. An
        input is then divided by the power of two by which its code is too large; 0: it is not.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, count = x.shape[0], x.shape[1] if order is None else len(order)
    units = ceil_div(count, unit)
    values = torch.empty(tokens, unit, units, dtype=torch.float32, device=x.device)
    sums = torch.empty(tokens, units, dtype=torch.float32, device=x.device)
    grid = (tokens, ceil_div(units, BLOCK))
    _arrange[grid](
        x, values, sums,
        x if order is None else order, x if factor is None else factor,
        x.stride(0), count, units,
        UNIT=unit, BITS=bits, ORDER=order is not None, FACTOR=factor is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return Arranged(values, sums)


@triton.jit
def _scaled(value, PLACE: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr):
    """Divides by 2**PLACE, unless the code spans two words, which are shifted together."""
    if BITS > 0:
        if PLACE + BITS <= UNIT:
            value = value * (1.0 / (1 << PLACE))
    return value


@triton.jit
def _arrange(
    x, values, sums, order, factor,
    stride, count, units,
    UNIT: tl.constexpr, BITS: tl.constexpr, ORDER: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    u = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(UNIT):
        place = u * UNIT + j
        inside = place < count
        source = place
        if ORDER:
            source = tl.load(order + place, mask=inside, other=0)
        value = tl.load(x + token * stride + source, mask=inside, other=0.0).to(tl.float32)
        if FACTOR:
            value = value * tl.load(factor + place, mask=inside, other=0.0).to(tl.float32)
        total += value
        value = _scaled(value, (j * BITS) % UNIT, BITS, UNIT)
        tl.store(values + (token * UNIT + j) * units + u, value, mask=u < units)
    tl.store(sums + token * units + u, total, mask=u < units)
