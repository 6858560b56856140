"""Describes the fields of an options class in words: type, default and meaning."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

WIDTH = 92  # columns of text; help() indents it, and a terminal of 100 columns still holds it
TYPE_NAMES: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "True or False"}
TYPE_NAMES |= {Path: "path", NoneType: "None", Any: "any value", dict: "mapping"}
LIMITS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class FieldText:
    """One field of an options class, in words.

    name: as in Python.
    type_name: such as "integer from 2 to 8".
    default: as Python writes it; None if a value is required.
    meaning: the description of the field.
    """

    name: str
    type_name: str
    default: str | None
    meaning: str

    @property
    def facts(self) -> str:
        """Type and default, as in "integer from 2 to 8; default 4"."""
        return f"{self.type_name}; " + (
            "required" if self.default is None else f"default {self.default}"
        )


def field_texts(fields: Mapping[str, FieldInfo]) -> list[FieldText]:
    """Describes the fields of a pydantic model, in the order of their definition."""
    return [
        FieldText(
            name,
            _type_name(field.annotation, field.metadata),
            None if field.is_required() else shown(field.get_default(call_default_factory=True)),
            field.description or "",
        )
        for name, field in fields.items()
    ]


def section(fields: Mapping[str, FieldInfo]) -> str:
    """Returns the section of a docstring that lists all fields; empty if there are none."""
    wrap = textwrap.TextWrapper(WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines = ["Fields:"] if fields else []
    for text in field_texts(fields):
        lines += [f"    {text.name}: {text.facts}", *wrap.wrap(text.meaning)]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Writes a value so that both Python and YAML can read it."""
    if isinstance(value, str | Path):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{shown(key)}: {shown(v)}" for key, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type_name(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """Returns a type in words.

    limits: what pydantic keeps of `ge=2` and similar keywords of the field.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inner[0], [limit for field in inner[1:] for limit in field.metadata])
    if origin in (Union, UnionType):
        return ", or ".join(_type_name(each, limits) for each in sorted(inner, key=_is_none))
    if origin is Literal:
        *most, last = map(shown, inner)
        return f"{', '.join(most)} or {last}" if most else last
    if origin in (list, tuple):
        least = "one or more " if any(getattr(each, "min_length", 0) for each in limits) else ""
        return f"list of {least}{_plural(inner[0])}"
    word = TYPE_NAMES.get(origin or annotation) or str(getattr(annotation, "__name__", "any value"))
    numbers = _limits(limits) if annotation in (int, float) else ""
    return f"{word} {numbers}" if numbers else word


def _plural(annotation: Any) -> str:
    """Returns the plural for the elements of a list, without their limits."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(map(_plural, inner))
    return f"{_type_name(inner[0] if origin is Annotated else annotation)}s"


def _is_none(annotation: Any) -> bool:
    return annotation is NoneType


def _limits(limits: Iterable[Any]) -> str:
    """Returns the limits of a number in words: "from 2 to 8", "above 0, at most 1"."""
    values = {
        name: value
        for limit in limits
        for name in LIMITS
        if (value := getattr(limit, name, None)) is not None
    }
    if values.keys() == {"ge", "le"}:
        return f"from {values['ge']:,} to {values['le']:,}"
    return ", ".join(f"{LIMITS[name]} {values[name]:,}" for name in LIMITS if name in values)
