"""An extension of griffe, which mkdocstrings uses: docstrings of this house get Google's sections.

Here arguments stand one to a line, as "name: what it is", without a heading; a further line of the
same argument is indented by four. Paragraphs that begin with "Returns" stand below them.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

import griffe

NAMES = re.compile(r"^([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (.*)$")


class HouseDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_function(self, *, func: griffe.Function, **more: Any) -> None:
        if func.docstring:
            names = {parameter.name.lstrip("*") for parameter in func.parameters}
            func.docstring.value = with_sections(func.docstring.value, names, "Args")

    def on_class(self, *, cls: griffe.Class, **more: Any) -> None:
        if cls.docstring:
            names = set(cls.members) | {p.name for p in getattr(cls, "parameters", ())}
            cls.docstring.value = with_sections(cls.docstring.value, names, "Attributes")


def with_sections(text: str, names: Collection[str], title: str) -> str:
    """Returns a docstring with a section of arguments or attributes, and one of what it returns.

    names: of arguments or attributes; a paragraph whose first line names others stays as it is.
    """
    first, *paragraphs = re.split(r"\n\s*\n", text.strip())
    made, entries = [first], list[str]()
    for paragraph in paragraphs:
        lines = paragraph.split("\n")
        found = NAMES.match(lines[0])
        if found and set(found[1].split(", ")) <= set(names):
            entries += entries_of(lines)
        elif paragraph.startswith("Returns ") and title == "Args":
            made.append(
                "Returns:\n    " + paragraph.removeprefix("Returns ").replace("\n", "\n    ")
            )
        else:
            made.append(paragraph)
    if entries:
        made.insert(1, f"{title}:\n" + "\n".join(entries))
    return "\n\n".join(made)


def entries_of(lines: list[str]) -> Iterator[str]:
    """Yields the lines of a section, one entry for each name of a line such as "a, b: text"."""
    texts: list[tuple[str, str]] = []
    for line in lines:
        found = NAMES.match(line)
        if found:
            texts.append((found[1], found[2]))
        elif texts:
            names, text = texts[-1]
            texts[-1] = (names, f"{text} {line.strip()}")
    for names, text in texts:
        for name in names.split(", "):
            yield f"    {name}: {text}"
