"""The reference of the command line, from the commands themselves."""

import inspect
from collections.abc import Iterator
from typing import Any

import typer
from option_tables import cell, code

from lowbit.cli import app
from lowbit.cli.auto_quip import auto_quip


def cli_reference() -> str:
    """Returns a section for each command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    sections = [section(name, each) for name, each in every(group)]
    other = typer.Typer(add_completion=False, rich_markup_mode=None)
    other.command()(auto_quip)
    return "\n\n".join([*sections, section("auto_quip", typer.main.get_command(other), "")])


def every(group: Any, start: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the name and the command of each command, those of groups as GROUP NAME."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every(command, f"{start}{name} ")
        else:
            yield f"{start}{name}", command


def section(name: str, command: Any, program: str = "lowbit ") -> str:
    """Returns the section of one command.

    command: of click.
    program: what stands in front of the name.
    """
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    about = inspect.cleandoc(command.help or "").replace("<", "&lt;")
    parts = [f"## {program}{name}", f"```text\n{program}{name} {usage}\n```", about]
    shown = [parameter for parameter in command.params if parameter.name != "help"]
    rows = [row for parameter in shown if (row := parameter.get_help_record(context))]
    if rows:
        lines = ["| argument or option | meaning |", "| --- | --- |"]
        lines += [f"| {code(names)} | {cell(meaning)} |" for names, meaning in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
