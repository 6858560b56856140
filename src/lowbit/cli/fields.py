"""Prints paragraphs and the fields of options classes within 80 columns."""

import textwrap
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from lowbit.cli.screen import text_width
from lowbit.fields import FieldText, shown


def print_paragraphs(screen: Console, text: str) -> None:
    """Prints text, whose paragraphs are separated by empty lines."""
    for paragraph in text.split("\n\n"):
        screen.print(textwrap.fill(" ".join(paragraph.split()), text_width(screen)))
        screen.print()


def print_fields(
    screen: Console,
    texts: Iterable[FieldText],
    values: Mapping[str, Any] | None = None,
    marked: Collection[str] = (),
) -> None:
    """Prints each field, and below it a paragraph with its meaning.

    texts: the fields.
    values: the value of each field, which is shown instead of its type and default; None: type and
        default are shown.
    marked: names of the fields that get an asterisk.
    """
    width = text_width(screen)
    for text in texts:
        facts = text.facts if values is None else shown(values[text.name])
        star = "*" if text.name in marked else ""
        lines = textwrap.wrap(f"{text.name}{star}: {facts}", width - 2, subsequent_indent="    ")
        for i, line in enumerate(lines):
            name = len(text.name) if i == 0 else 0
            screen.print(Text.assemble("  ", (line[:name], "cyan"), line[name:]), soft_wrap=True)
        screen.print(textwrap.indent(textwrap.fill(text.meaning, width - 6), " " * 6))
