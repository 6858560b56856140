"""Fill the template in page/: HTML escapes everything that is put into it."""

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
FEW_NAMES = 6  # of what fell back, that need not be hidden
MOST_NAMES = 200  # that are listed; report.json has them all


def render(run: Run, results: Sequence[ResultRecord] = ()) -> str:
    """The page as one HTML document. results: of `lowbit eval --json`, the float model first."""
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
        fallen=fallen_back(run),
        others=_others(run),
        few=FEW_NAMES,
        most_names=MOST_NAMES,
    )


@dataclass(frozen=True)
class Fallen:
    """What fell back for one reason. names: with the numbers in which their reasons differ."""

    reason: str
    names: list[tuple[str, str]]


def fallen_back(run: Run) -> list[Fallen]:
    """What fell back, by reason, and what was left float."""
    found: dict[tuple[str, ...], list[tuple[str, list[int]]]] = {}
    for name, reason in run.report.fallbacks.items():
        text, numbers = COUNT.split(reason), [int(count) for count in COUNT.findall(reason)]
        found.setdefault(tuple(text), []).append((name, numbers))
    fallen = [_fallen(text, members) for text, members in found.items()]
    if run.report.left_float:
        fallen.append(Fallen("left in float", [(name, "") for name in run.report.left_float]))
    return fallen


def _fallen(text: tuple[str, ...], members: list[tuple[str, list[int]]]) -> Fallen:
    """Reasons that differ in numbers only, as one: "too few calibration tokens (3 to 15): ..."."""
    columns = list(zip(*(numbers for _, numbers in members), strict=True))
    spans = [f"{min(c)} to {max(c)}" if min(c) < max(c) else f"{min(c)}" for c in columns]
    reason = "".join(part + span for part, span in zip(text, [*spans, ""], strict=True))
    differ = any(min(column) < max(column) for column in columns)
    return Fallen(
        reason,
        [(name, ", ".join(map(str, numbers)) if differ else "") for name, numbers in members],
    )


def setting(value: Any) -> str:
    """A value of a method's field."""
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
    """The other keys of made_by that have a value."""
    return {key: value for key, value in run.made_by.others.items() if value not in (None, [], {})}
