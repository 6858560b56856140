"""Patterns for the names of linears: --skip, --only, --allow-float, and `overrides` of a method."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern with * ? [] matches the whole name, or the last parts of it.

    "down_proj", "mlp.*" and "layers.3.*" match "model.layers.3.mlp.down_proj"; "proj" does not.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether at least one of the patterns matches."""
    return any(matches(name, pattern) for pattern in patterns)
