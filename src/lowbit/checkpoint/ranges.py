"""Write equal entries of many layers once: model.layers.{0-31}.self_attn.q_proj.

Qwen3-30B-A3B has 18,624 quantized matrices; spelt out they would make config.json 3 MB long.
In an entry for many layers, `shares` names each layer's own neighbour: "{}" in the place of a
number stands for the number at that place, counted from the left, of the layer's name.
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
        first = _for_many(names[0], entries[names[0]])
        if ranged is not None and all(_for_many(n, entries[n]) == first for n in names):
            collapsed[ranged] = first
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
            entries[name] = _for_one(name, entry)
    return entries


def _for_many(name: str, entry: Any) -> Any:
    """The entry of a layer with what it shares in a form that its like in other blocks have too."""
    shares = entry.get("shares") if isinstance(entry, dict) else None
    if not isinstance(shares, str):
        return entry
    numbers = NUMBER.findall(shares)
    if numbers != NUMBER.findall(name)[: len(numbers)]:
        return entry
    return entry | {"shares": NUMBER.sub("{}", shares)}


def _for_one(name: str, entry: Any) -> Any:
    """The inverse of `_for_many`. Raises ValueError where the name has too few numbers."""
    shares = entry.get("shares") if isinstance(entry, dict) else None
    if not isinstance(shares, str) or "{}" not in shares:
        return entry
    numbers = NUMBER.findall(name)
    if shares.count("{}") > len(numbers):
        raise ValueError(f"{name!r} has {len(numbers)} numbers, but shares {shares!r}")
    for number in numbers:
        shares = shares.replace("{}", number, 1)
    return entry | {"shares": shares}


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
