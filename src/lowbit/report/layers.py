"""Quantized linears as the report shows them: what they cost in bytes and what they lost."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from lowbit.checkpoint import QuantizedFolder
from lowbit.run_report import LinearReport

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a name: of an expert, of a block
# Not settings, or of one layer alone.
UNSHOWN = re.compile(
    r"format|shape|bias|shares|bits|group_size|activation|seed.*|transform.*|.*dtype"
)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A quantized linear.

    name: on disk, relative to its block.
    entry: of config.json.
    bytes: without the bias.
    report: what the run reported, if it is known.
    fallback: why and how it was quantized in a simpler way than asked for.
    """

    name: str
    entry: dict[str, Any]
    bytes: int
    report: LinearReport | None
    fallback: str | None

    @property
    def error(self) -> float | None:
        """Signal to noise in decibels, inf for an exact copy, None where it is not known."""
        return None if self.report is None else self.report.signal_to_noise_db

    @property
    def proxy_loss(self) -> float | None:
        return None if self.report is None else self.report.proxy_loss

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
    def slices(self) -> dict[int, float]:
        """The worst signal to noise at each number of bits, of weights that have several."""
        found: dict[int, float] = {}
        for linear in self.linears:
            for bits, error in linear.report.slices_db.items() if linear.report else ():
                found[bits] = min(error, found.get(bits, math.inf))
        return found

    @property
    def fallen(self) -> list[Linear]:
        """Those that fell back."""
        return [linear for linear in self.linears if linear.fallback]


def settings(entry: dict[str, Any]) -> str:
    """ "uniform, 2 bits, groups of 64": the format of a linear, from its entry in config.json."""
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
    quantized: QuantizedFolder,
    name: str,
    inside: str,
    report: LinearReport | None,
    fallback: str | None,
) -> Linear:
    """name: on disk, in full. inside: the block's prefix, which is left out."""
    tensors = quantized.reader.tensors
    stored = (tensors[t].bytes for t in quantized.tensors_of(name) if t != f"{name}.bias")
    return Linear(
        name=name.removeprefix(inside),
        entry=quantized.entries[name],
        bytes=sum(stored),
        report=report,
        fallback=fallback,
    )


def layers_of(linears: Iterable[Linear]) -> tuple[Layer, ...]:
    """In the order of their first linears."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        found.setdefault(NUMBER.sub("*", linear.name), []).append(linear)
    return tuple(
        Layer(name if len(same) > 1 else same[0].name, tuple(same)) for name, same in found.items()
    )
