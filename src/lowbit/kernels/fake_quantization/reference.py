"""The rounding of a weight to its grids, and its gradients, in plain torch.

Only the weight and its grids are saved for the way back, which computes the codes again. On the CPU
everything runs over a few rows at a time: temporary tensors then stay in the second-level cache,
and the operating system does not map them anew in every step, as it does above 32 MiB.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels.straight_through import round_ste

TILE = 2**18  # weights of a tile on the CPU: 1 MiB for each of its few temporary tensors
# A tile has a multiple of so many rows, and the last one also has what is left. Gradients are laid
# out by columns, as the product of a linear gives them. Torch sums the rows of such a tensor up in
# the same order, however many there are, only in fours of its widest vectors.
ROWS = 64

Zero = Tensor | float  # the zero point of each group, or of all


def fake_quantize(values: Tensor, scale: Tensor, zero: Zero, top: int, fine: bool = True) -> Tensor:
    """Returns weights rounded to their grids, scale * (code - zero), with gradients.

    Gradients go to the weights and to the scales. Rounding has the gradient of the identity
    (straight-through estimator). A clamped weight gets none; it contributes only to the gradient of
    its scale, as in LSQ.

    values: (rows, groups, size) float32.
    scale: (rows, groups, 1) float32.
    zero: (rows, groups, 1) float32, or a number. With zero points that are learned, which clamped
        weights move, every operation is left to autograd.
    top: the largest code; the least is 0.
    fine: whether zero points may have fractions; otherwise two operations are spared.
    """
    if isinstance(zero, Tensor) and zero.requires_grad:
        return _by_operations(values, scale, zero, top)
    ends: tuple[Zero, Zero, Zero | None] = (-zero, top - zero, None)
    if fine:
        fraction = zero % 1
        low = fraction - zero
        ends = (low, low + top, fraction)
    result: Tensor = _FakeQuantize.apply(values, scale, *ends)
    return result


def nearest_code(steps: Tensor, zero: Zero) -> Tensor:
    """Returns the code nearest to steps + zero, not clamped.

    Only the fraction of the zero point enters the rounding, so that an integer zero point shifts
    all codes alike and does not change how ties are rounded.

    steps: the weights divided by the scale.
    """
    fraction = zero % 1
    return (steps + fraction).round_().add_(zero - fraction)


def _by_operations(values: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    fraction = zero % 1
    codes = (round_ste(values / scale + fraction) + (zero - fraction)).clamp(0, top)
    return (codes - zero) * scale


class _FakeQuantize(torch.autograd.Function):
    """The arguments after `scale` are of each group, (rows, groups, 1), or numbers.

    low, high: the least and the largest code, counted from the zero point without its fraction.
    fraction: of the zero point; None: there is none.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, low: Zero, high: Zero, fraction: Zero | None
    ) -> Tensor:
        numbers = (low, high, fraction)
        tensors = [each if isinstance(each, Tensor) else None for each in numbers]
        ctx.save_for_backward(values, scale, *tensors)
        ctx.numbers = [None if isinstance(each, Tensor) else each for each in numbers]
        out = torch.empty_like(values)
        for rows in _tiles(values):
            a, b, shift = (_of_rows(each, rows) for each in numbers)
            codes = values[rows] / scale[rows]
            if shift is not None:
                codes += shift
            codes.round_().clamp_(a, b)
            if shift is not None:
                codes -= shift
            torch.mul(codes, scale[rows], out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, *tensors = ctx.saved_tensors
        numbers = [n if t is None else t for n, t in zip(ctx.numbers, tensors, strict=True)]
        by_values = torch.empty_like(values) if ctx.needs_input_grad[0] else None
        by_scale = torch.empty_like(scale) if ctx.needs_input_grad[1] else None
        for rows in _tiles(values):
            a, b, shift = (_of_rows(each, rows) for each in numbers)
            unit, given = scale[rows], gradient[rows]
            steps = values[rows] / unit
            rounded = (steps if shift is None else steps + shift).round()
            codes = rounded.clamp(a, b)
            passing = torch.where(rounded == codes, given * unit, 0.0)
            if by_values is not None:
                torch.div(passing, unit, out=by_values[rows])
            if by_scale is not None:
                if shift is not None:
                    codes -= shift
                of_codes = (given * codes).sum(-1, keepdim=True)
                of_steps = passing.neg_().mul_(steps.div_(unit)).sum(-1, keepdim=True)
                torch.add(of_codes, of_steps, out=by_scale[rows])
        return by_values, by_scale, None, None, None


def _of_rows(each: Zero | None, rows: slice) -> Any:
    return each[rows] if isinstance(each, Tensor) else each


def _tiles(values: Tensor) -> Iterator[slice]:
    """Yields the rows of each tile; on other devices than the CPU one tile has all rows."""
    count, weights = len(values), max(1, values[:1].numel())
    size = max(1, count)
    if values.device.type == "cpu":
        size = max(1, TILE // weights // ROWS) * ROWS
    first = 0
    while first < count:
        stop = first + size if count - first >= size + ROWS else count
        yield slice(first, stop)
        first = stop
