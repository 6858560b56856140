"""How counts, bytes and seconds grow from miniatures to the model that they are miniatures of.

Each kind of count is a sum of two neighbouring powers of the length: calls of torch a constant and
one for each column, values lengths and areas, operations of products areas and volumes. Two
miniatures, one twice as long as the other, determine both parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

from lowbit.pipeline.dry_run import DryRun
from lowbit.pipeline.meters import CUBES, KINDS, LAUNCHES, OPERATIONS, VALUES, WHOLE_VALUES

# The lower of the two powers of the length that each kind of count is a sum of.
POWERS = {LAUNCHES: 0, VALUES: 1, WHOLE_VALUES: 1, OPERATIONS: 2, CUBES: 2}
# The most that one value of an operation takes, in passes over a large tensor. What a miniature
# takes beyond that is of a busy machine, and would grow to years.
SLOWEST = 8
Part = Callable[[DryRun], Any]  # takes a part out of a dry run


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How much more the model takes than its miniatures.

    divisor: what the lengths of the model were divided by, for the longer miniature.
    more_experts: how many more experts the model has, relative to those of the miniatures.
    rates: the seconds of one of each kind of count.
    short, long, more: what was counted: of the shorter and of the longer miniature, and of a longer
        one with twice as many experts; None: the miniatures have all experts.
    measured, measured_short: what was measured of the longer and of the shorter miniature.
    """

    divisor: int
    more_experts: float
    rates: Any
    short: DryRun
    long: DryRun
    more: DryRun | None
    measured: DryRun
    measured_short: DryRun

    def counts(self, part: Part) -> Any:
        """Returns the counts of a part of the model's dry run."""
        short, long = part(self.short), part(self.long)
        if not numpy.ndim(long):
            return numpy.zeros(KINDS)
        grown = [self._grown(short[kind], long[kind], POWERS[kind]) for kind in range(KINDS)]
        return numpy.array(grown) * self._with_experts(part)

    def bytes(self, part: Part) -> int:
        """Returns the bytes of something that grows with lengths and areas."""
        return round(self.amount(part))

    def memory(self, part: Part) -> int:
        """Returns the bytes of all tensors in a part of the model's dry run.

        If the longer miniature takes less than twice as much as the shorter one, most of what that
        one takes does not grow, such as the table of a codebook: all of the longer one's bytes then
        count as areas.
        """
        shorter, longer = (max(0, part(run).memory) for run in (self.short, self.long))
        areas = self.amount(lambda run: max(0, part(run).memory))
        if longer < 2 * shorter:
            areas = longer * self.divisor**2 * float(self._with_experts(lambda r: part(r).memory))
        short, long = (part(run).lengths for run in (self.short, self.long))
        return round(areas + self._grown(short, long, 0))

    def amount(self, part: Part) -> float:
        """Returns an amount that grows with lengths and areas, such as the number of weights."""
        grown = self._grown(part(self.short), part(self.long), 1)
        return float(grown * self._with_experts(part))

    def seconds(self, part: Part) -> float:
        """Returns the seconds of a part of the model's dry run.

        What the longer miniature took beyond what its counts say belongs to calls and to values, in
        shares that follow from what the shorter one took. If it took less, all is faster in
        proportion.
        """
        short, long = part(self.short), part(self.long)
        if not numpy.ndim(long):
            return 0.0
        counts, taken = self.counts(part), float(part(self.measured))
        expected, found = float(self.rates @ long), float(self.rates @ counts)
        rest = taken - expected
        if rest <= 0:
            return found * taken / expected if expected else 0.0
        earlier = max(0.0, float(part(self.measured_short)) - float(self.rates @ short))
        calls = long[LAUNCHES] / max(1.0, short[LAUNCHES])
        values = [each[VALUES] + each[WHOLE_VALUES] for each in (short, long, counts)]
        more_values = values[1] - calls * values[0]
        of_values = 0.0
        if more_values > 0:  # in seconds for one value
            of_values = min(max(0.0, rest - calls * earlier) / more_values, rest / values[1])
            of_values = min(of_values, SLOWEST * self.rates[WHOLE_VALUES])
        of_calls = (rest - of_values * values[1]) / max(1.0, long[LAUNCHES])
        return float(found + of_values * values[2] + of_calls * counts[LAUNCHES])

    def _grown(self, short: float, long: float, power: int) -> float:
        """Returns a s^power + b s^(power + 1) for the model, from its values for s = 1 and 2."""
        b = max(0.0, long / 2**power - short)
        a = short - b
        if a < 0:
            a, b = 0.0, long / 2 ** (power + 1)
        size = 2 * self.divisor
        return a * size**power + b * size ** (power + 1)

    def _with_experts(self, part: Part) -> Any:
        """Returns by how much all other experts multiply counts or an amount."""
        if self.more is None:
            return 1.0
        long, more = numpy.asarray(part(self.long), float), numpy.asarray(part(self.more), float)
        ratio = numpy.divide(more, long, out=numpy.ones_like(long), where=long > 0)
        return 1 + self.more_experts * numpy.maximum(ratio - 1, 0)
