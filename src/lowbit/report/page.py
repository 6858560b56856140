"""Fills the template in page/. All values that are put into it are escaped."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lowbit.quantities import duration, size
from lowbit.report.drawing import (
    CURVE_HEIGHT,
    CURVE_WIDTH,
    bits_grid,
    block_bars,
    curve_of,
    decibels,
    error_grid,
    layer_error,
    loss,
    loss_change,
)
from lowbit.report.records import ResultRecord
from lowbit.report.results import result_tables
from lowbit.report.run import Run
from lowbit.version import __version__

COUNT = re.compile(r"\d{1,18}")
FEW_NAMES = 6  # a list of up to so many fallbacks or warnings is shown open
MOST_NAMES = 200  # names in a list; report.json has all of them


def render(run: Run, results: Sequence[ResultRecord] = ()) -> str:
    """Returns the page as one HTML document.

    run: the quantized folder.
    results: measurements of `lowbit eval --json`; the others are compared with the first.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "size": size,
        "loss": loss,
        "decibels": decibels,
        "layer_error": layer_error,
        "loss_change": loss_change,
        "setting": setting,
    }
    return environment.get_template("page.html").render(
        run=run,
        version=__version__,
        results=result_tables(results, run.folder),
        errors=error_grid(run.blocks),
        bits=bits_grid(run.blocks),
        bars=block_bars(run),
        curves={block.name: curve_of(block) for block in run.blocks},
        curve_size=(CURVE_WIDTH, CURVE_HEIGHT),
        fallbacks=fallback_groups(run),
        others=_others(run),
        few=FEW_NAMES,
        most_names=MOST_NAMES,
    )


@dataclass(frozen=True)
class FallbackGroup:
    """All linears and blocks with the same fallback.

    reason: why and how they were quantized in another way than requested.
    names: each name, with the numbers in which its reason differs from the others.
    """

    reason: str
    names: list[tuple[str, str]]


def fallback_groups(run: Run) -> list[FallbackGroup]:
    """Groups the fallbacks of a run by reason, and adds the linears that were left in float."""
    by_reason: dict[tuple[str, ...], list[tuple[str, list[int]]]] = {}
    for name, reason in run.report.fallbacks.items():
        text, numbers = COUNT.split(reason), [int(count) for count in COUNT.findall(reason)]
        by_reason.setdefault(tuple(text), []).append((name, numbers))
    groups = [_group(text, members) for text, members in by_reason.items()]
    if run.report.left_float:
        left = [(name, "") for name in run.report.left_float]
        groups.append(FallbackGroup("left in float", left))
    return groups


def _group(text: tuple[str, ...], members: list[tuple[str, list[int]]]) -> FallbackGroup:
    """Joins reasons that differ only in numbers: "too few calibration tokens (3 to 15): ..."."""
    columns = list(zip(*(numbers for _, numbers in members), strict=True))
    spans = [f"{min(c)} to {max(c)}" if min(c) < max(c) else f"{min(c)}" for c in columns]
    reason = "".join(part + span for part, span in zip(text, [*spans, ""], strict=True))
    differ = any(min(column) < max(column) for column in columns)
    return FallbackGroup(
        reason,
        [(name, ", ".join(map(str, numbers)) if differ else "") for name, numbers in members],
    )


def setting(value: Any) -> str:
    """Formats the value of a method's field."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {setting(inner)}" for key, inner in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _others(run: Run) -> dict[str, Any]:
    """Returns the keys of made_by that have a value and no line of their own on the page."""
    return {key: value for key, value in run.made_by.others.items() if value not in (None, [], {})}
