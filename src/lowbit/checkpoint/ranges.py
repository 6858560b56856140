"""Write equal entries of many layers once: model.layers.{0-31}.self_attn.q_proj.

Qwen3-30B-A3B has 18,624 quantized matrices; spelt out they would make config.json 3 MB long.
"""

import re
from collections import defaultdict
from itertools import product
from math import prod
from typing import Any

RANGE = re.compile(r"\{(\d{1,9})-(\d{1,9})\}")
MOST_NAMES = 1_000_000  # a hostile range must not fill the memory


def collapse(entries: dict[str, Any]) -> dict[str, Any]:
    """Names that differ in whole ranges of numbers, with equal entries, become one."""
    by_template: dict[str, list[str]] = defaultdict(list)
    for name in entries:
        by_template[re.sub(r"(?<![^.])\d+(?![^.])", "*", name)].append(name)
    collapsed: dict[str, Any] = {}
    for template, names in by_template.items():
        ranged = _ranged(template, names)
        same = all(entries[name] == entries[names[0]] for name in names)
        if ranged is not None and same:
            collapsed[ranged] = entries[names[0]]
        else:
            collapsed.update({name: entries[name] for name in names})
    return collapsed


def expand(collapsed: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `collapse`. Raises ValueError for a range that is empty or far too long."""
    entries: dict[str, Any] = {}
    for pattern, entry in collapsed.items():
        bounds = [(int(a), int(b)) for a, b in RANGE.findall(pattern)]
        count = prod(max(0, high - low + 1) for low, high in bounds)
        if not 0 < count <= MOST_NAMES - len(entries):
            raise ValueError(f"{pattern!r} names {count} layers; allowed are 1 to {MOST_NAMES}")
        template = RANGE.sub("{}", pattern.replace("{}", ""))
        for numbers in product(*(range(low, high + 1) for low, high in bounds)):
            entries[template.format(*numbers) if bounds else pattern] = entry
    return entries


def _ranged(template: str, names: list[str]) -> str | None:
    places = template.split(".")
    numbered = [i for i, place in enumerate(places) if place == "*"]
    if not numbered or len(names) < 2:
        return None
    tuples = {tuple(int(name.split(".")[i]) for i in numbered) for name in names}
    bounds = [(min(column), max(column)) for column in zip(*tuples, strict=True)]
    if len(tuples) != prod(high - low + 1 for low, high in bounds):
        return None
    for place, (low, high) in zip(numbered, bounds, strict=True):
        places[place] = f"{{{low}-{high}}}" if high > low else str(low)
    return ".".join(places)
