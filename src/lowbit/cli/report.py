"""lowbit report: one HTML page about a quantized folder."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lowbit.checkpoint.writer import aside, explained
from lowbit.cli.screen import console, size
from lowbit.models.locate import locate
from lowbit.report import read_results, read_run, render


def report(
    model: Annotated[str, Argument(metavar="OUT", help="A quantized folder.")],
    output: Annotated[
        Path | None,
        Option("-o", "--output", metavar="FILE", help="The page; without it OUT/report.html."),
    ] = None,
    results: Annotated[
        Path | None,
        Option(metavar="FILE", help="What lowbit eval --json wrote: shown as a table."),
    ] = None,
) -> None:
    """Write one HTML page: results, error and bits of every layer, what the run cost."""
    folder = locate(model)
    page = render(read_run(folder), read_results(results) if results else ())
    path = output or folder / "report.html"
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"-o {path}: that is a folder, or in a folder that does not exist")
    with explained(path.parent), aside(path) as part:
        part.write_text(page, encoding="utf-8")
    console().print(f"{path}: {size(path.stat().st_size)}, nothing else is needed", soft_wrap=True)
