"""Rounding a rotated weight to words of a codebook: how wide the rows are spread, which words.

A row r of the weight is rounded as scale_r * words. One scale serves all rows, or each has its own,
which takes more bits and loses less: `spread` weighs the one against the other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.solvers.feedback import (
    Rounded,
    damped_factor,
    greedy_pass,
    round_with_feedback,
    row_losses,
)

DB_PER_BIT = 20 * math.log10(2)  # what another bit for each weight gains, at any number of bits
SAMPLED_ROWS = 128  # on which scales are compared: so many, or a quarter if that is less
MOST_VALUES = 2**26  # weights that are rounded at once, at several scales: 256 MB, a few times

Nearest = Callable[[Tensor], tuple[Tensor, Tensor]]  # (rows, dim) -> codes (rows,), (rows, dim)
RowScale = Literal["auto", "never", "always"]


@dataclass(frozen=True)
class Words:
    """codes: (rows, blocks)  values: (rows, blocks * dim), the words  scale: (rows,) or (1,)

    loss: (rows,), of scale * words under the damped Hessian.
    """

    codes: Tensor
    values: Tensor
    scale: Tensor
    loss: Tensor


class Rounder:
    """Rounds weights that read one input, in words of `dim` weights, with that input's Hessian.

    hessian: (columns, columns), None for one that is not known. factored: False where rounding goes
    without feedback, since the Hessian is not known or is not positive definite.
    """

    def __init__(
        self, hessian: Tensor | None, columns: int, dim: int, damping: float, device: torch.device
    ) -> None:
        self.dim = dim
        self.columns = columns
        self.padding = -columns % dim  # columns of zeros, to fill the last word
        found = None
        if hessian is not None:
            mean = hessian.diagonal().mean()
            padded = functional.pad(hessian, (0, self.padding, 0, self.padding))
            padded.diagonal()[columns:] = mean
            found = damped_factor(padded, damping, dim)
        self.factored = found is not None
        if found is None:
            eye = torch.eye(columns + self.padding, device=device)
            found = eye, eye
        self.hessian, self.factor = found

    def round(self, weight: Tensor, scale: Tensor, nearest: Nearest) -> Words:
        """Block LDLQ.  weight: (rows, columns)  scale: (rows,)"""
        unit = self._unit(weight, scale)
        rounded = round_with_feedback(unit, self.factor, _of_any_column(nearest), self.dim)
        return self._words(unit, scale, rounded)

    def improve(self, weight: Tensor, words: Words, nearest: Nearest, passes: int) -> Words:
        """Greedy passes over words that were rounded before; no row becomes worse."""
        if not passes or not self.factored:
            return words
        unit, rounded = self._unit(weight, words.scale), Rounded(words.values, words.codes)
        for _ in range(passes):
            rounded = greedy_pass(unit, self.hessian, rounded, _of_any_column(nearest), self.dim)
        return self._words(unit, words.scale, rounded)

    def energy(self, weight: Tensor) -> float:
        """tr(W H W^T), what losses are a share of.  weight: (rows, columns)"""
        return float(self._losses(weight).sum())

    def _unit(self, weight: Tensor, scale: Tensor) -> Tensor:
        # A division by infinity is the 0 that a row without a scale should get, and never NaN.
        unit = weight / scale.masked_fill(scale == 0, torch.inf).unsqueeze(-1)
        return functional.pad(unit, (0, self.padding))

    def _words(self, unit: Tensor, scale: Tensor, rounded: Rounded) -> Words:
        loss = self._losses(unit - rounded.values) * scale.square()
        return Words(rounded.codes, rounded.values, scale, loss)

    def _losses(self, error: Tensor) -> Tensor:
        """Of the columns that there are.  error: (rows, columns or more)  ->  (rows,)"""
        n = self.columns
        return row_losses(error[:, :n], self.hessian[:n, :n])


def _of_any_column(nearest: Nearest) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    return lambda column, target: nearest(target)


@dataclass(frozen=True)
class Spread:
    """How scales are chosen.

    size: the root mean square of rows that are divided by their scale  ratios: what it is tried
    times; one: no search  rows: whether each row has its own scale  row_bits: what that takes, in
    bits for each weight  stored: a scale to what is stored of it, in float32  passes: greedy ones.
    """

    size: float
    ratios: Sequence[float]
    rows: RowScale
    row_bits: float
    stored: Callable[[Tensor], Tensor]
    passes: int


def spread(
    weight: Tensor, rounder: Rounder, nearest: Nearest, how: Spread, generator: torch.Generator
) -> Words:
    """The weight in words at the scales that lose least.  weight: (rows, columns)

    With how.rows "auto" each row has its own scale where that gains DB_PER_BIT decibels of the loss
    for each bit that it takes. One scale is chosen on SAMPLED_ROWS rows; a row's own on that row.
    The result's scale is (1,) or (rows,).
    """
    single, own = _scales(weight, how)
    count = min(SAMPLED_ROWS, -(-len(weight) // 4))
    sample = torch.randperm(len(weight), generator=generator)[:count].to(weight.device)
    by_row, best = how.rows == "always", 0
    if how.rows == "auto" or (how.rows == "never" and len(single) > 1):
        tried = torch.cat([single[:, sample], own[:, sample]])
        losses = _round_all(weight[sample], tried, rounder, nearest).loss.view(2, len(single), -1)
        shared, apart = losses[0].sum(1), losses[1].amin(0).sum()
        best = int(shared.argmin())
        worth = 10 ** (-how.row_bits * DB_PER_BIT / 10)
        by_row = how.rows == "auto" and float(apart) < worth * float(shared[best])
    scales = own if by_row else single[best : best + 1]
    rows = max(1, MOST_VALUES // (len(scales) * weight.shape[1]))
    parts = [
        rounder.improve(part, _round_best(part, tried, rounder, nearest), nearest, how.passes)
        for part, tried in zip(weight.split(rows), scales.split(rows, 1), strict=True)
    ]
    codes, values, loss = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "values", "loss")
    )
    return Words(
        codes, values, torch.cat([p.scale for p in parts]) if by_row else scales[0, :1], loss
    )


def _scales(weight: Tensor, how: Spread) -> tuple[Tensor, Tensor]:
    """One scale for all and one for each row, by ratio: twice (ratios, rows)."""
    square = weight.square()
    sizes = square.mean().sqrt().reshape(1), square.mean(1).sqrt()
    one, each = (
        torch.stack([how.stored(size / (how.size * ratio)) for ratio in how.ratios])
        for size in sizes
    )
    return one.expand_as(each), each


def _round_all(weight: Tensor, scales: Tensor, rounder: Rounder, nearest: Nearest) -> Words:
    """Each row at several scales, all at once.  scales: (tries, rows)  ->  tries * rows rows"""
    return rounder.round(weight.repeat(len(scales), 1), scales.flatten(), nearest)


def _round_best(weight: Tensor, scales: Tensor, rounder: Rounder, nearest: Nearest) -> Words:
    """Each row at that of several scales at which it loses least.  scales: (tries, rows)"""
    tried = _round_all(weight, scales, rounder, nearest)
    rows = torch.arange(len(weight), device=weight.device)
    best = tried.loss.view(scales.shape).argmin(0) * len(weight) + rows
    return Words(tried.codes[best], tried.values[best], tried.scale[best], tried.loss[best])
