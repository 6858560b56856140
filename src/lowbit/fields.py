"""The fields of a configuration in plain words: type, default and meaning."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

WIDTH = 92  # columns of help() in a terminal of 100
KINDS: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "True or False"}
KINDS |= {Path: "path", NoneType: "None", Any: "any value", dict: "mapping"}
LIMITS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class FieldText:
    """One field in words. default: None where a value is required."""

    name: str
    kind: str
    default: str | None
    meaning: str

    @property
    def facts(self) -> str:
        """Type and default: "integer from 2 to 8; default 4"."""
        return f"{self.kind}; " + (
            "required" if self.default is None else f"default {self.default}"
        )


def field_texts(fields: Mapping[str, FieldInfo]) -> list[FieldText]:
    """The fields of a pydantic model, in their order."""
    return [
        FieldText(
            name,
            _kind(field.annotation, field.metadata),
            None if field.is_required() else shown(field.get_default(call_default_factory=True)),
            field.description or "",
        )
        for name, field in fields.items()
    ]


def section(fields: Mapping[str, FieldInfo]) -> str:
    """The section of a docstring that lists all fields; empty where there are none."""
    wrap = textwrap.TextWrapper(WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines = ["Fields:"] if fields else []
    for text in field_texts(fields):
        lines += [f"    {text.name}: {text.facts}", *wrap.wrap(text.meaning)]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as Python and YAML both read it."""
    if isinstance(value, str | Path):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{shown(key)}: {shown(v)}" for key, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """A type in words; limits: what pydantic keeps of `ge=2` and the like."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0], [limit for field in inner[1:] for limit in field.metadata])
    if origin in (Union, UnionType):
        return ", or ".join(_kind(each, limits) for each in sorted(inner, key=_is_none))
    if origin is Literal:
        *most, last = map(shown, inner)
        return f"{', '.join(most)} or {last}" if most else last
    if origin in (list, tuple):
        least = "one or more " if any(getattr(each, "min_length", 0) for each in limits) else ""
        return f"list of {least}{_plural(inner[0])}"
    word = KINDS.get(origin or annotation) or str(getattr(annotation, "__name__", "any value"))
    numbers = _limits(limits) if annotation in (int, float) else ""
    return f"{word} {numbers}" if numbers else word


def _plural(annotation: Any) -> str:
    """The elements of a list, without their limits."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(map(_plural, inner))
    return f"{_kind(inner[0] if origin is Annotated else annotation)}s"


def _is_none(annotation: Any) -> bool:
    return annotation is NoneType


def _limits(limits: Iterable[Any]) -> str:
    """In words: "from 2 to 8", "above 0, at most 1"."""
    found = {
        name: value
        for limit in limits
        for name in LIMITS
        if (value := getattr(limit, name, None)) is not None
    }
    if found.keys() == {"ge", "le"}:
        return f"from {found['ge']:,} to {found['le']:,}"
    return ", ".join(f"{LIMITS[name]} {found[name]:,}" for name in LIMITS if name in found)
