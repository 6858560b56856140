"""Parts of pages about other programs, from the exporters."""

import importlib
from typing import Any

from option_tables import cell, first_line

from lowbit.exporters import TARGETS


def targets() -> str:
    """Returns the table of the targets of `lowbit export`."""
    lines = ["| target | read by | what is written |", "| --- | --- | --- |"]
    for name, exporter in TARGETS.items():
        lines.append(f"| `{name}` | {exporter.readers} | {cell(first_line(exporter))} |")
    return "\n".join(lines)


def architectures(target: str) -> str:
    """Returns the names of the architectures that a target is written for."""
    places: dict[str, str] = {
        "gguf": "lowbit.exporters.gguf.architectures",
        "mlc": "lowbit.exporters.mlc.names",
        "mlx": "lowbit.exporters.mlx",
    }
    known: Any = importlib.import_module(places[target]).ARCHITECTURES
    return ", ".join(f"`{name}`" for name in sorted(known))


def usage(target: str) -> str:
    """Returns what the docstring of an exporter's class says below its first line."""
    text = (TARGETS[target].__doc__ or "").partition("\n")[2]
    return cell(text)
