"""The quantized linears as the report shows them: their size and their error."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from lowbit.checkpoint import QuantizedFolder
from lowbit.run_report import LinearReport

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a name: the number of a block or an expert
# Fields of an entry that are shown elsewhere, are no settings, or differ between all layers.
UNSHOWN = re.compile(
    r"format|shape|bias|shares|bits|group_size|activation|rotation|seed.*|transform.*|.*dtype"
)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A quantized linear.

    name: its name on disk, relative to its block.
    entry: its entry in config.json.
    bytes: its size in bytes, without the bias.
    report: what the run reported; None: unknown.
    fallback: why and how it was quantized in a simpler way than requested; None: no fallback.
    """

    name: str
    entry: dict[str, Any]
    bytes: int
    report: LinearReport | None
    fallback: str | None

    @property
    def error(self) -> float | None:
        """Signal-to-noise ratio of the weight in decibels: inf if exact, None if unknown."""
        return None if self.report is None else self.report.signal_to_noise_db

    @property
    def proxy_loss(self) -> float | None:
        return None if self.report is None else self.report.proxy_loss

    @property
    def weights(self) -> int:
        return prod(self.entry["shape"])


@dataclass(frozen=True)
class Layer:
    """One linear of a block, or several (of experts) whose names differ only in a number.

    name: the name of the linear; with * for the number if there are several.
    linears: the linear, or all of them.
    """

    name: str
    linears: tuple[Linear, ...]

    @property
    def bytes(self) -> int:
        return sum(linear.bytes for linear in self.linears)

    @property
    def weights(self) -> int:
        return sum(linear.weights for linear in self.linears)

    @property
    def bits(self) -> float:
        """Real bits per weight, scales included."""
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
        """The linear with the lowest signal-to-noise ratio; None if none is known."""
        measured = [linear for linear in self.linears if linear.error is not None]
        return min(measured, key=lambda linear: linear.error or 0.0, default=None)

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
        """The worst signal-to-noise ratio at each width, for weights that have several widths."""
        worst: dict[int, float] = {}
        for linear in self.linears:
            for bits, error in linear.report.slices_db.items() if linear.report else ():
                worst[bits] = min(error, worst.get(bits, math.inf))
        return worst

    @property
    def fallbacks(self) -> list[Linear]:
        """The linears for which a fallback was used."""
        return [linear for linear in self.linears if linear.fallback]


def settings(entry: dict[str, Any]) -> str:
    """Describes the format of a linear, as in "uniform, 2 bits, groups of 64".

    entry: the linear's entry in config.json.
    """
    parts = [entry["format"]]
    if "bits" in entry:
        parts.append(f"{entry['bits']} bits")
    if "group_size" in entry:
        size = entry["group_size"]
        parts.append("per row" if size is None else f"groups of {size}")
    if entry.get("activation"):
        parts.append(f"inputs {entry['activation'].get('bits')} bits")
    if entry.get("rotation"):
        parts.append("rotated inputs")
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
    """Collects what the report shows of a linear.

    name: full name on disk.
    inside: prefix of the block, which is removed from the name.
    report, fallback: as in `Linear`.
    """
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
    """Groups linears whose names differ only in a number; layers keep the order of the linears."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(NUMBER.sub("*", linear.name), []).append(linear)
    return tuple(
        Layer(name if len(same) > 1 else same[0].name, tuple(same)) for name, same in groups.items()
    )
