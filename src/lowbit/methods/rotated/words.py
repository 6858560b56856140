"""Round a rotated weight to words of a code, and choose the scales of its rows.

Row r of the weight is approximated by scale_r * words. Either all rows have one scale, or each has
its own, which takes more bits and has a lower loss; `spread` decides between both. A word is `dim`
columns wide. It has one row, or as many as a strip, whose rows are rounded together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.kernels.at_once import at_once
from lowbit.solvers.feedback import (
    Place,
    Quantize,
    Rounded,
    damped_factor,
    filled,
    greedy_pass,
    greedy_pass_in_strips,
    round_with_feedback,
    row_losses,
)

DB_PER_BIT = 20 * math.log10(2)  # the gain of another bit per weight, at any number of bits
SAMPLED_ROWS = 128  # scales are compared on so many rows, or on a quarter of them if that is less
MOST_VALUES = 2**26  # weights times scales that are rounded at once: a few buffers of 256 MB

# The nearest words to a block of columns, (rows, dim) or fewer columns at the end of the weight:
# their codes (strips, ...) and the words (rows, dim). NaN stands for a weight that does not matter.
Nearest = Callable[[Tensor], tuple[Tensor, Tensor]]
RowScale = Literal["auto", "never", "always"]


@dataclass(frozen=True)
class Words:
    """A weight rounded to scale * words.

    codes: (strips, blocks, ...), the code of each word.
    values: (rows, blocks * dim), the words.
    scale: (rows,) or (1,).
    loss: (rows,), the loss of scale * words under the damped Hessian.
    """

    codes: Tensor
    values: Tensor
    scale: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Outputs:
    """The Hessian of a linear's outputs, as `damped_factor` returns it for blocks of TILE rows.

    damped, factor: (rows, rows), where rows that `filled` has added come last.
    """

    damped: Tensor
    factor: Tensor

    def of_rows(self, scale: Tensor) -> Tensor:
        """Returns the damped Hessian where errors are in the unit of their row. scale: (rows,)"""
        rows = len(scale)
        return self.damped[:rows, :rows] * scale.unsqueeze(1) * scale


class Rounder:
    """Rounds weights that read the same input to words, with the Hessian of that input.

    The attribute `factored` is False if weights are rounded without feedback, because there is no
    Hessian or it is not positive definite.

    hessian: (columns, columns), or None.
    columns: the number of inputs.
    dim: the number of weights in a word.
    damping: the share of the mean diagonal that is added to the diagonal.
    """

    def __init__(
        self, hessian: Tensor | None, columns: int, dim: int, damping: float, device: torch.device
    ) -> None:
        self.dim = dim
        self.columns = columns
        self.padding = -columns % dim  # columns of zeros, to fill the last word
        factors = None
        if hessian is not None:
            factors = damped_factor(filled(hessian, dim), damping, dim)
        self.factored = factors is not None
        if factors is None:
            eye = torch.eye(columns + self.padding, device=device)
            factors = eye, eye
        self.hessian, self.factor = factors

    def round(
        self, weight: Tensor, scale: Tensor, nearest: Nearest, outputs: Outputs | None = None
    ) -> Words:
        """Rounds a weight (rows, columns) with scales (rows,) by block LDLQ.

        outputs: the Hessian of the outputs; None: rows are independent.
        """
        unit, rows, row_factor = self._unit(weight, scale), len(weight), None
        if outputs is not None:
            fill = len(outputs.factor) - rows
            unit = functional.pad(unit, (0, 0, 0, fill))
            scales = functional.pad(scale, (0, fill), value=1.0)
            # Errors are measured in the unit of their row.
            inverse = scales.reciprocal().masked_fill(scales == 0, 0)
            row_factor = outputs.factor * scales.unsqueeze(1) * inverse
        quantize = self._quantize(nearest, rows)
        rounded = round_with_feedback(unit, self.factor, quantize, self.dim, row_factor)
        strip = len(unit) // len(rounded.codes)
        rounded = Rounded(rounded.values[:rows], rounded.codes[: -(-rows // strip)])
        return self._words(unit[:rows], scale, rounded)

    def improve(
        self,
        weight: Tensor,
        words: Words,
        nearest: Nearest,
        passes: int,
        outputs: Outputs | None = None,
    ) -> Words:
        """Improves rounded words by greedy passes; the loss of no row grows.

        outputs: as in `round`; then the loss of the whole weight does not grow.
        """
        if not passes or not self.factored:
            return words
        unit, rounded = self._unit(weight, words.scale), Rounded(words.values, words.codes)
        of_block = self._quantize(nearest, len(weight))
        for _ in range(passes):
            if outputs is None:
                rounded = greedy_pass(unit, self.hessian, rounded, of_block, self.dim)
                continue
            side = outputs.of_rows(words.scale)
            rounded = greedy_pass_in_strips(unit, self.hessian, side, rounded, of_block, self.dim)
        return self._words(unit, words.scale, rounded)

    def energy(self, weight: Tensor) -> float:
        """Returns tr(W H W^T), the energy of the output, for a weight (rows, columns)."""
        return float(self._losses(weight).sum())

    def _unit(self, weight: Tensor, scale: Tensor) -> Tensor:
        # A row with the scale 0 is divided by infinity, which gives zeros and never NaN.
        unit = weight / scale.masked_fill(scale == 0, torch.inf).unsqueeze(-1)
        return functional.pad(unit, (0, self.padding))

    def _words(self, unit: Tensor, scale: Tensor, rounded: Rounded) -> Words:
        loss = self._losses(unit - rounded.values) * scale.square()
        loss = loss.masked_fill(unit[:, 0].isnan(), 0)  # rows that only fill their strip
        return Words(rounded.codes, rounded.values, scale, loss)

    def _losses(self, error: Tensor) -> Tensor:
        """Returns the loss of each row, (rows,), for an error that may have padding columns."""
        n = self.columns
        return row_losses(error[:, :n], self.hessian[:n, :n])

    def _quantize(self, nearest: Nearest, rows: int) -> Quantize:
        """Returns a `Quantize` of `solvers.feedback`; weights that fill a word do not matter.

        rows: number of rows; further ones fill a tile.
        """

        def quantize(place: Place, target: Tensor) -> tuple[Tensor, Tensor]:
            if isinstance(place.columns, int):
                return nearest(target[:, : self.columns - place.columns])
            assert isinstance(place.rows, Tensor)
            left = self.columns - place.columns.unsqueeze(1)
            filling = torch.arange(self.dim, device=target.device) >= left
            filling |= place.rows.unsqueeze(1) >= rows
            return nearest(target.masked_fill(filling, torch.nan))

        return quantize


@dataclass(frozen=True)
class Spread:
    """How `spread` chooses scales.

    size: the root mean square that a row should have after division by its scale.
    ratios: the factors of `size` that are tried; with a single one there is no search.
    strip: the number of rows that are rounded together.
    rows: whether each row has its own scale.
    row_bits: the cost of scales per row, in bits per weight.
    stored: rounds a scale to the dtype in which it is stored, and returns it in float32.
    passes: the number of greedy passes; 0 if a strip has several rows.
    """

    size: float
    ratios: Sequence[float]
    rows: RowScale
    row_bits: float
    stored: Callable[[Tensor], Tensor]
    passes: int
    strip: int = 1


def spread(
    weight: Tensor,
    rounder: Rounder,
    nearest: Nearest,
    how: Spread,
    generator: torch.Generator,
    outputs: Outputs | None = None,
) -> Words:
    """Rounds a weight to words with the scales that have the lowest loss.

    A common scale is chosen on SAMPLED_ROWS rows, the scale of a single row on that row. If
    how.rows is "auto", each row gets its own scale if this lowers the loss by at least DB_PER_BIT
    decibels for each bit per weight that it costs.

    weight: (rows, columns).
    rounder: rounds with the Hessian of the weight's input.
    nearest: the codebook.
    generator: chooses the sampled rows.
    outputs: the Hessian of the outputs; None: rows are independent. Scales are chosen without it.

    Returns the words, with a scale of shape (1,) or (rows,).
    """
    single, own = _scales(weight, how)
    count = min(SAMPLED_ROWS, -(-len(weight) // 4))
    count = min(len(weight), count + -count % how.strip)
    sample = torch.randperm(len(weight), generator=generator)[:count].to(weight.device)
    by_row, best = how.rows == "always", 0
    if how.rows == "auto" or (how.rows == "never" and len(single) > 1):
        tried = torch.cat([single[:, sample], own[:, sample]])
        rounded = _round_all(weight[sample], tried, rounder, nearest, how.strip)
        losses = _strip_losses(rounded, len(tried), how.strip).view(2, len(single), -1)
        shared, apart = losses[0].sum(1), losses[1].amin(0).sum()
        best = int(shared.argmin())
        needed = 10 ** (-how.row_bits * DB_PER_BIT / 10)  # the factor by which the loss must fall
        by_row = how.rows == "auto" and float(apart) < needed * float(shared[best])
    scales = own if by_row else single[best : best + 1]
    if outputs is not None:
        chosen = scales[0]
        if by_row and len(scales) > 1:
            chosen = _in_parts(weight, scales, rounder, nearest, replace(how, passes=0)).scale
        words = rounder.round(weight, chosen, nearest, outputs)
        words = rounder.improve(weight, words, nearest, how.passes, outputs)
        return words if by_row else replace(words, scale=chosen[:1])
    words = _in_parts(weight, scales, rounder, nearest, how)
    return words if by_row else replace(words, scale=scales[0, :1])


def _in_parts(
    weight: Tensor, scales: Tensor, rounder: Rounder, nearest: Nearest, how: Spread
) -> Words:
    """Rounds each strip at the scale with the lowest loss, of several scales (tries, rows)."""
    most = at_once(MOST_VALUES)
    rows = max(1, most // (len(scales) * weight.shape[1] * how.strip)) * how.strip
    parts = [
        _round_part(part, tried, rounder, nearest, how)
        for part, tried in zip(weight.split(rows), scales.split(rows, 1), strict=True)
    ]
    codes, values, loss, scale = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("codes", "values", "loss", "scale")
    )
    return Words(codes, values, scale, loss)


def _scales(weight: Tensor, how: Spread) -> tuple[Tensor, Tensor]:
    """Returns the common scale and the scale of each row for each ratio: twice (ratios, rows)."""
    square = weight.square()
    sizes = square.mean().sqrt().reshape(1), square.mean(1).sqrt()
    one, each = (
        torch.stack([how.stored(size / (how.size * ratio)) for ratio in how.ratios])
        for size in sizes
    )
    return one.expand_as(each), each


def _round_all(
    weight: Tensor, scales: Tensor, rounder: Rounder, nearest: Nearest, strip: int
) -> Words:
    """Rounds each row at several scales (tries, rows).

    The result has tries * rows rows, where rows of NaN fill the last strip of each try.
    """
    fill = -len(weight) % strip
    weight = functional.pad(weight, (0, 0, 0, fill), value=torch.nan)
    scales = functional.pad(scales, (0, fill), value=1.0)
    return rounder.round(weight.repeat(len(scales), 1), scales.flatten(), nearest)


def _strip_losses(words: Words, tries: int, strip: int) -> Tensor:
    """Returns the loss of each strip of each try: (tries, strips)."""
    return words.loss.view(tries, -1, strip).sum(-1)


def _round_part(
    weight: Tensor, scales: Tensor, rounder: Rounder, nearest: Nearest, how: Spread
) -> Words:
    """Does that for some strips at once."""
    tried = _round_all(weight, scales, rounder, nearest, how.strip)
    best = _strip_losses(tried, len(scales), how.strip).argmin(0)
    chosen = best * len(best) + torch.arange(len(best), device=weight.device)
    within = torch.arange(how.strip, device=weight.device)
    rows = (chosen.unsqueeze(1) * how.strip + within).flatten()
    found = Words(tried.codes[chosen], tried.values[rows], tried.scale[rows], tried.loss[rows])
    n = len(weight)
    if how.passes:  # only of words of one row: greedy passes look at each row alone
        found = rounder.improve(weight, found, nearest, how.passes)
    return Words(found.codes, found.values[:n], found.scale[:n], found.loss[:n])
