"""Tables of the fields of methods and options, and of recipes, from their pydantic models."""

import html
import importlib
import inspect
from collections.abc import Collection, Iterable
from typing import Any

from house_docstrings import NAMES, entries_of

from lowbit.cli.options import method_of
from lowbit.cli.recipes import DEFAULT_FAMILY, _widths
from lowbit.events import KINDS
from lowbit.fields import FieldText, field_texts
from lowbit.methods import METHODS
from lowbit.recipes import load_recipe, recipe_names


def cell(text: str) -> str:
    """Returns text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Returns text as code for a cell of a table; backticks would show the signs of `cell`."""
    return f"<code>{html.escape(' '.join(text.split())).replace('|', '&#124;')}</code>"


def fields_table(texts: Iterable[FieldText], marked: Collection[str] = ()) -> str:
    """Returns a table of fields; those in `marked` get an asterisk."""
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for text in texts:
        name = f"`{text.name}`" + " \\*" * (text.name in marked)
        default = "required" if text.default is None else code(text.default)
        lines.append(f"| {name} | {cell(text.type_name)} | {default} | {cell(text.meaning)} |")
    return "\n".join(lines)


def method_fields(name: str) -> str:
    """Returns the table of a method's fields, and the recipes that use it."""
    method = METHODS[name]
    table = fields_table(field_texts(method.model_fields), method.per_linear)
    using = [f"`{each}`" for each in recipe_names() if load_recipe(each).method == name]
    note = "\n\n\\* may differ for single linears, by `overrides`." if method.per_linear else ""
    return f"{table}{note}\n\nRecipes: {', '.join(using)}."


def all_methods() -> str:
    """Returns a section for each method: what it does, and its fields."""
    return "\n\n".join(
        f"## {name}\n\n{cell(method.about.partition(chr(10))[0])} "
        f"[More](../methods/{name}.md), in Python `lowbit.methods.{method.__name__}`.\n\n"
        f"{method_fields(name)}"
        for name, method in METHODS.items()
    )


def options(path: str) -> str:
    """Returns the table of the fields of an options class, given as "lowbit.Calibration"."""
    module, _, name = path.rpartition(".")
    return fields_table(field_texts(getattr(importlib.import_module(module), name).model_fields))


def recipes() -> str:
    """Returns the table of all recipes, with the bits of a linear of 4096 x 4096."""
    lines = ["| recipe | bits per weight | for |", "| --- | --- | --- |"]
    for name in recipe_names():
        recipe = load_recipe(name)
        widths = _widths(method_of(name, recipe, DEFAULT_FAMILY, {}), recipe)
        bits = ", ".join(f"{width.bits:.2f}" for width in widths) or "a float model"
        lines.append(f"| `{name}` | {bits} | {cell(recipe.description)} |")
    return "\n".join(lines)


def event_kinds() -> str:
    """Returns the table of the kinds of events."""
    lines = ["| kind | class | fields | meaning |", "| --- | --- | --- | --- |"]
    for kind, event in KINDS.items():
        names = ", ".join(f"`{name}`" for name in inspect.signature(event).parameters)
        about = (inspect.getdoc(event) or "").partition("\n")[0]
        lines.append(f"| `{kind}` | `{event.__name__}` | {names} | {cell(about)} |")
    return "\n".join(lines)


def attributes(path: str) -> str:
    """Returns a table of what the docstring of a class, "module.Class", says of its attributes."""
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    text = getattr(thing, "about", None) or inspect.getdoc(thing) or ""
    lines = ["| key | meaning |", "| --- | --- |"]
    for paragraph in text.split("\n\n")[1:]:
        if NAMES.match(paragraph):
            for entry in entries_of(paragraph.split("\n")):
                key, _, meaning = entry.strip().partition(": ")
                lines.append(f"| `{key}` | {cell(meaning)} |")
    return "\n".join(lines)


def first_line(thing: Any) -> str:
    """Returns the first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]
