"""Quantized linears as the report shows them: what they cost in bytes and what they lost."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from lowbit.checkpoint import QuantizedFolder
from lowbit.report.records import LinearRecord

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a name: of an expert, of a block
# Not settings, or of one layer alone.
UNSHOWN = re.compile(
    r"format|shape|bias|shares|bits|group_size|activation|seed.*|transform.*|.*dtype"
)


@dataclass(frozen=True)
class Linear:
    """name: on disk, relative to its block. bytes: without the bias. error: signal to noise in
    decibels, inf for an exact copy, None where it is not known. slices: the same when it is read
    with fewer bits, by their number. gave_up: why it fell back.
    """

    name: str
    entry: dict[str, Any]
    bytes: int
    error: float | None
    proxy_loss: float | None
    slices: dict[str, float | None]
    gave_up: str | None

    @property
    def weights(self) -> int:
        return prod(self.entry["shape"])


@dataclass(frozen=True)
class Layer:
    """Linears of one block that only a number tells apart, as experts are; mostly a single one."""

    name: str  # with * for the number, where there are several
    linears: tuple[Linear, ...]

    @property
    def bytes(self) -> int:
        return sum(linear.bytes for linear in self.linears)

    @property
    def weights(self) -> int:
        return sum(linear.weights for linear in self.linears)

    @property
    def bits(self) -> float:
        """Real ones for each weight."""
        return 8 * self.bytes / self.weights

    @property
    def settings(self) -> str:
        return " / ".join(dict.fromkeys(settings(linear.entry) for linear in self.linears))

    @property
    def shapes(self) -> str:
        shapes = (f"{n} × {k}" for n, k in (linear.entry["shape"] for linear in self.linears))
        return " / ".join(dict.fromkeys(shapes))

    @property
    def worst(self) -> Linear | None:
        """The linear with the least signal to noise."""
        known = [linear for linear in self.linears if linear.error is not None]
        return min(known, key=lambda linear: linear.error or 0.0, default=None)

    @property
    def error(self) -> float | None:
        return None if self.worst is None else self.worst.error

    @property
    def best_error(self) -> float | None:
        return max((x.error for x in self.linears if x.error is not None), default=None)

    @property
    def proxy_loss(self) -> float | None:
        return max((x.proxy_loss for x in self.linears if x.proxy_loss is not None), default=None)

    @property
    def slices(self) -> dict[str, float]:
        """The worst of each width."""
        found: dict[str, float] = {}
        for linear in self.linears:
            for bits, error in linear.slices.items():
                exact = math.inf if error is None else error
                found[bits] = min(exact, found.get(bits, math.inf))
        return found

    @property
    def gave_up(self) -> list[Linear]:
        return [linear for linear in self.linears if linear.gave_up]


def settings(entry: dict[str, Any]) -> str:
    """ "uniform, 2 bits, groups of 64": what an entry of config.json says of the format."""
    parts = [entry["format"]]
    if "bits" in entry:
        parts.append(f"{entry['bits']} bits")
    if "group_size" in entry:
        size = entry["group_size"]
        parts.append("per row" if size is None else f"groups of {size}")
    if entry.get("activation"):
        parts.append(f"inputs {entry['activation'].get('bits')} bits")
    for key, value in entry.items():
        if value is True:
            parts.append(key.replace("_", " "))
        elif value and not UNSHOWN.fullmatch(key):
            parts.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(parts)


def linear_of(
    quantized: QuantizedFolder, name: str, inside: str, record: LinearRecord, gave_up: str | None
) -> Linear:
    """name: on disk, in full. inside: the block's prefix, which is left out."""
    tensors = quantized.reader.tensors
    stored = (tensors[t].bytes for t in quantized.tensors_of(name) if t != f"{name}.bias")
    error = math.inf if record.exact else record.signal_to_noise_db
    short = name.removeprefix(inside)
    entry, slices = quantized.entries[name], record.slices_db
    return Linear(short, entry, sum(stored), error, record.proxy_loss, slices, gave_up)


def layers_of(linears: Iterable[Linear]) -> tuple[Layer, ...]:
    """In the order of their first linears."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        found.setdefault(NUMBER.sub("*", linear.name), []).append(linear)
    return tuple(
        Layer(name if len(same) > 1 else same[0].name, tuple(same)) for name, same in found.items()
    )
