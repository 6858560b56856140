"""What a plan may spend: mean bits of the quantized linears, or bytes of the whole model."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lowbit.allocate.units import Unit
from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.checkpoint.slices import entries_with_widths, linear_weights
from lowbit.formats.widths import entry_bytes, needs_codes

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # as sizes are shown
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?B)?\s*", re.IGNORECASE)
OVERFLOW_HEADER = 128  # bytes, at most, by which a tensor more makes a header longer, but its name


@dataclass(frozen=True)
class Budget:
    """A folder's own bytes beside its slices, and the limit on both together.

    given: as it was written.
    weights: how many the quantized linears have.
    linears: bytes of the quantized linears that have no widths.
    rest: bytes of the shards that are no quantized linear, headers too.
    """

    given: str
    weights: int
    linears: int
    rest: int

    def allowed(self) -> int:
        """Bytes that all slices may take together."""
        amount, unit = _parsed(self.given)
        if unit is None:
            return math.floor(amount * self.weights / 8) - self.linears
        return math.floor(amount * UNITS[unit]) - self.linears - self.rest

    def bits(self, slices: int) -> float:
        """Bits per weight of the quantized linears, scales and zeros counted."""
        return 8 * (self.linears + slices) / self.weights

    def bytes(self, slices: int) -> int:
        """Of all shards."""
        return self.linears + self.rest + slices

    def check(self, smallest: int) -> None:
        """ValueError where not even the smallest slices, in bytes, can be had."""
        if smallest <= self.allowed():
            return
        _, unit = _parsed(self.given)
        if unit is None:
            least = f"{math.ceil(self.bits(smallest) * 1000) / 1000:.3f} bits"
        else:
            power = UNITS[unit]
            least = f"{math.ceil(self.bytes(smallest) / power * 1000) / 1000:.3f} {unit}"
        raise ValueError(
            f"the budget is {self.given}: the smallest that these widths allow is {least}, with "
            "scales and zeros"
        )


def budget_of(folder: QuantizedFolder, given: str) -> Budget:
    """given: "3.2" bits per weight of the quantized linears, or "2.1GB" of the model's shards."""
    _parsed(given)
    entries = entries_with_widths(folder)
    masters = sum(map(entry_bytes, entries.values()))
    size, weights = size_of(folder.folder), linear_weights(folder)
    linears = round(size.linears * weights / 8) - masters
    overflows = [name for name, entry in entries.items() if needs_codes(entry)]
    headers = sum(len(name) + OVERFLOW_HEADER for name in overflows)
    return Budget(given.strip(), weights, linears, size.bytes - masters - linears + headers)


def _parsed(given: str) -> tuple[Fraction, str | None]:
    match = AMOUNT.fullmatch(given)
    if match is None:
        raise ValueError(
            f"the budget is {given!r}: allowed are bits per weight, such as 3.2, or a size, such "
            "as 2.1GB"
        )
    unit = match[2] and next(known for known in UNITS if known.lower() == match[2].lower())
    return Fraction(match[1]), unit


def spent(units: Sequence[Unit], widths: Sequence[int]) -> int:
    """Bytes of the slices, where `widths` gives each unit its own."""
    return sum(unit.bytes[width] for unit, width in zip(units, widths, strict=True))
