"""Writes equal entries of many layers as one: model.layers.{0-31}.self_attn.q_proj.

Qwen3-30B-A3B has 18,624 quantized matrices; with one entry each, config.json would take 3 MB.

An entry may name another layer whose tensors it shares (`shares`), which differs from layer to
layer. In an entry for many layers, the first "{}" of `shares` stands for the first number in the
layer's own name, the second "{}" for the second number, and so on.
"""

import re
from collections import defaultdict
from itertools import product
from math import prod
from typing import Any

RANGE = re.compile(r"\{([0-9]{1,9})-([0-9]{1,9})\}")
NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")  # between dots, no leading zeros
MOST_NAMES = 1_000_000  # so that a malicious range cannot fill the memory


def collapse(entries: dict[str, Any]) -> dict[str, Any]:
    """Joins equal entries of layers whose names differ only in numbers that fill whole ranges.

    entries: the entries by name of the layer.

    Returns the entries by name; joined ones by a name with ranges such as "{0-31}".
    """
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
    """Returns one entry for each layer: the inverse of `collapse`.

    Raises ValueError for a range that is empty, for more than MOST_NAMES layers, and for a layer
    that is named twice.
    """
    entries: dict[str, Any] = {}
    for pattern, entry in collapsed.items():
        bounds = [(int(a), int(b)) for a, b in RANGE.findall(pattern)]
        count = prod(max(0, high - low + 1) for low, high in bounds)
        if not 0 < count <= MOST_NAMES - len(entries):
            raise ValueError(
                f"{pattern!r} names {count} layers; allowed are 1 to {MOST_NAMES} in all"
            )
        start, *after = RANGE.split(pattern)[::3]  # the text before, between and after the ranges
        for numbers in product(*(range(low, high + 1) for low, high in bounds)):
            name = start + "".join(f"{n}{text}" for n, text in zip(numbers, after, strict=True))
            if name in entries:
                raise ValueError(f"{name!r} is named twice, once by {pattern!r}")
            entries[name] = _for_one(name, entry)
    return entries


def _for_many(name: str, entry: Any) -> Any:
    """Returns a layer's entry with "{}" for the numbers in `shares` that its own name has too."""
    shares = entry.get("shares") if isinstance(entry, dict) else None
    if not isinstance(shares, str):
        return entry
    numbers = NUMBER.findall(shares)
    if numbers != NUMBER.findall(name)[: len(numbers)]:
        return entry
    return entry | {"shares": NUMBER.sub("{}", shares)}


def _for_one(name: str, entry: Any) -> Any:
    """Inverse of `_for_many`. Raises ValueError if the name has fewer numbers than `shares` {}."""
    shares = entry.get("shares") if isinstance(entry, dict) else None
    if not isinstance(shares, str) or "{}" not in shares:
        return entry
    numbers = NUMBER.findall(name)
    if shares.count("{}") > len(numbers):
        raise ValueError(
            f"{name!r} has {len(numbers)} numbers, but shares {shares!r}, which needs a number for "
            "each {}"
        )
    for number in numbers:
        shares = shares.replace("{}", number, 1)
    return entry | {"shares": shares}


def _ranged(names: list[str]) -> str | None:
    """Returns one pattern for names that differ only in numbers; None if these leave gaps."""
    if len(names) < 2:
        return None
    numbers = {tuple(map(int, NUMBER.findall(name))) for name in names}
    bounds = [(min(column), max(column)) for column in zip(*numbers, strict=True)]
    if len(numbers) != prod(high - low + 1 for low, high in bounds):
        return None
    ranges = iter(f"{{{low}-{high}}}" if high > low else str(low) for low, high in bounds)
    return NUMBER.sub(lambda match: next(ranges), names[0])
