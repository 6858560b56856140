"""Parts of pages that show code of the repository: docstrings, files, what a command prints."""

import importlib
import inspect
import re
from pathlib import Path

from typer.testing import CliRunner

from lowbit.cli import app

ROOT = Path(__file__).parents[2]


def docstring(module: str) -> str:
    """Returns the docstring of a module, which is Markdown, without the title line."""
    text = inspect.getdoc(importlib.import_module(module)) or ""
    return escaped(text.partition("\n")[2].strip("\n"))


def escaped(text: str) -> str:
    """Returns text in which a "<" outside of code shows as itself."""
    lines = text.split("\n")
    return "\n".join(
        line if line.startswith("    ") else re.sub(r"<(?=[A-Za-z/])", "&lt;", line)
        for line in lines
    )


def file_text(path: str, language: str = "text") -> str:
    """Returns a file of the repository as a block of code."""
    return f"```{language}\n{(ROOT / path).read_text(encoding='utf-8').rstrip()}\n```"


def python_file(path: str) -> str:
    """Returns a Python file of the repository as a block of code, titled with its path."""
    return f'```python title="{path}"\n{(ROOT / path).read_text(encoding="utf-8").rstrip()}\n```'


def command(*words: str) -> str:
    """Returns what a command of lowbit prints, as a block of text."""
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "90"})
    assert result.exit_code == 0, result.output
    return f"```text\n$ lowbit {' '.join(words)}\n{result.stdout.rstrip()}\n```"
