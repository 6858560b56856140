"""Write equal entries of many layers once: model.layers.{0-31}.self_attn.q_proj.

Qwen3-30B-A3B has 18,624 quantized matrices; spelt out they would make config.json 3 MB long.
"""

import re
from collections import defaultdict
from itertools import product
from math import prod
from typing import Any

RANGE = re.compile(r"\{([0-9]{1,9})-([0-9]{1,9})\}")
NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")  # a part of a name, as int prints it
MOST_NAMES = 1_000_000  # a hostile range must not fill the memory


def collapse(entries: dict[str, Any]) -> dict[str, Any]:
    """Names that differ in whole ranges of numbers, with equal entries, become one."""
    by_template: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in entries:
        by_template[tuple(NUMBER.split(name))].append(name)
    collapsed: dict[str, Any] = {}
    for names in by_template.values():
        ranged = _ranged(names)
        same = all(entries[name] == entries[names[0]] for name in names)
        if ranged is not None and same:
            collapsed[ranged] = entries[names[0]]
        else:
            collapsed.update({name: entries[name] for name in names})
    return collapsed


def expand(collapsed: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `collapse`.

    Raises ValueError for a range that is empty or far too long, and for a name given twice.
    """
    entries: dict[str, Any] = {}
    for pattern, entry in collapsed.items():
        bounds = [(int(a), int(b)) for a, b in RANGE.findall(pattern)]
        count = prod(max(0, high - low + 1) for low, high in bounds)
        if not 0 < count <= MOST_NAMES - len(entries):
            raise ValueError(
                f"{pattern!r} names {count} layers; allowed are 1 to {MOST_NAMES} in all"
            )
        start, *behind = RANGE.split(pattern)[::3]  # what stands around the ranges
        for numbers in product(*(range(low, high + 1) for low, high in bounds)):
            name = start + "".join(f"{n}{text}" for n, text in zip(numbers, behind, strict=True))
            if name in entries:
                raise ValueError(f"{name!r} is named twice, once by {pattern!r}")
            entries[name] = entry
    return entries


def _ranged(names: list[str]) -> str | None:
    """One pattern for names of one template; None when their numbers do not fill whole ranges."""
    if len(names) < 2:
        return None
    numbers = {tuple(map(int, NUMBER.findall(name))) for name in names}
    bounds = [(min(column), max(column)) for column in zip(*numbers, strict=True)]
    if len(numbers) != prod(high - low + 1 for low, high in bounds):
        return None
    ranges = iter(f"{{{low}-{high}}}" if high > low else str(low) for low, high in bounds)
    return NUMBER.sub(lambda match: next(ranges), names[0])
