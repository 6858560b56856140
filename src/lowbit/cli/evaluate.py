"""lowbit eval: what quantization cost, in one table."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer import Argument, Option

from lowbit.checkpoint.writer import write_json
from lowbit.cli.device import device_map
from lowbit.cli.screen import change, console, size
from lowbit.eval import EvalOptions, Evaluation
from lowbit.eval import evaluate as measure


def evaluate(  # noqa: PLR0913 (a command's options)
    model: Annotated[str, Argument(metavar="MODEL", help="What the others are compared with.")],
    others: Annotated[
        list[str] | None, Argument(metavar="[OUT]...", help="Quantized folders, or any models.")
    ] = None,
    text: Annotated[
        list[str] | None,
        Option(metavar="NAME|FILE", help="wikitext2, c4, ptb or a file; repeatable."),
    ] = None,
    seqlen: Annotated[int | None, Option(help="Tokens in a window.")] = None,
    per_document: Annotated[
        bool, Option("--per-document", help="Score each document by itself, from its BOS.")
    ] = False,
    limit: Annotated[int | None, Option(help="Windows (or documents) of each text.")] = None,
    json: Annotated[Path | None, Option(metavar="FILE", help="Write the numbers here too.")] = None,
    device: Annotated[str, Option(metavar="cpu|cuda:N|auto")] = "auto",
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Measure perplexity and real bits per weight, and compare."""
    options = EvalOptions(
        texts=tuple(text or ("wikitext2",)),
        seqlen=seqlen,
        per_document=per_document,
        limit=limit,
        device_map=device_map(device),
        trust_remote_code=trust_remote_code,
    )
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise ValueError(f"--json {json}: that is a folder, or in a folder that does not exist")
    found = _measure(list(dict.fromkeys([model, *(others or [])])), options)
    if json is not None:
        write_json(json, {row.model: row.to_json() for row in found})
    _show(console(), found)


def _measure(models: list[str], options: EvalOptions) -> list[Evaluation]:
    screen = console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn()
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as bar:
        task = bar.add_task("loading", total=None)

        def on_progress(name: str, done: int, of: int) -> None:
            bar.update(task, description=name, completed=done, total=of)

        return measure(models, options, on_progress)


def _show(screen: Console, rows: list[Evaluation]) -> None:
    first = rows[0]
    names = short_names([row.model for row in rows])
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("\nmodel", overflow="fold")
    for column in ("bits\n(linears)", "bits\n(model)", "\nsize"):
        table.add_column(column, justify="right", no_wrap=True)
    for text in first.perplexity:
        table.add_column(
            f"perplexity\n{Path(text).name}", justify="right", overflow="fold", min_width=10
        )
        if len(rows) > 1:
            table.add_column("\nchange", justify="right", no_wrap=True)
    for row, name in zip(rows, names, strict=True):
        cells = [name, *(f"{row.bits_per_weight[part]:.2f}" for part in ("linears", "model"))]
        cells.append(size(row.size_bytes))
        for text, value in row.perplexity.items():
            cells.append(f"{value:.3f}" if value < 1000 else f"{value:.3g}")
            if len(rows) > 1:
                cells.append("" if row is first else change(value, first.perplexity[text]))
        table.add_row(*cells)
    screen.print(table)
    screen.print(_conditions(first), style="dim", soft_wrap=True)


def _conditions(row: Evaluation) -> str:
    """What the numbers depend on, and must be equal where they are compared."""
    counts = ", ".join(f"{count:,} of {Path(text).name}" for text, count in row.windows.items())
    if row.per_document:
        return (
            f"perplexity per document, each from its BOS, of up to {row.seqlen:,} tokens: {counts}"
        )
    return f"perplexity over non-overlapping windows of {row.seqlen:,} tokens: {counts}"


def short_names(models: list[str]) -> list[str]:
    """Without the folders before them, where that tells them apart."""
    short = [Path(model).name or model for model in models]
    return short if len(set(short)) == len(short) else models
