"""Patterns for the names of linears: --skip, --only, --allow-float, and `overrides` of a method."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern with * ? [] means the whole name, or its last parts.

    "down_proj" and "mlp.*" match "model.layers.3.mlp.down_proj"; "layers.3.*" does too, and "proj"
    does not.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns)
