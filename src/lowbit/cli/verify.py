"""lowbit verify: checks a quantized folder, or an exported one against its source."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from lowbit.checkpoint.ranges import collapse
from lowbit.cli.export import stepping_bar
from lowbit.cli.integrity import check_exported, check_files
from lowbit.cli.screen import console
from lowbit.exporters import ComparedLayer, Comparison
from lowbit.exporters import verify as verify_folder
from lowbit.exporters.compare import RECORD
from lowbit.models.locate import locate


def verify(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL|DEST",
            help="Folder of a quantized model, or its hub id; or a folder that lowbit export "
            "wrote.",
        ),
    ],
    against: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            help="Folder of the quantized model, or its hub id, from which DEST was exported: each "
            "layer of DEST is decoded and compared. Default: none; the files are checked against "
            "their hashes.",
        ),
    ] = None,
) -> None:
    """Check the files of a quantized or exported folder."""
    screen = console()
    if against is None:
        place = locate(model)
        check = check_exported if (place / RECORD).is_file() else check_files
        check(place, screen)
        return
    folder, source = Path(model), locate(against)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    with stepping_bar() as on_step:
        found = verify_folder(folder, source, on_step=on_step)
    assert found is not None
    print_comparison(screen, found)
    if not found.equal:
        text = f"{folder} is not what lowbit export makes of {source}: export it again"
        console(stderr=True).print(text, style="red", soft_wrap=True)
        raise typer.Exit(1)
    count = len(found.layers)
    screen.print(f"{folder}: all {count:,} layers are as exported", style="bold", soft_wrap=True)


def print_comparison(screen: Console, comparison: Comparison) -> None:
    """Prints a line for all layers of the same name in different blocks that fare alike."""
    table = Table("layer", "in lowbit", f"in {comparison.target}", "largest error", "result")
    rows = collapse({layer.name: {"row": _row(layer)} for layer in comparison.layers})
    for name, entry in rows.items():
        table.add_row(name, *entry["row"])
    screen.print(table)
    for problem in comparison.problems:
        screen.print(problem, style="red", soft_wrap=True)


def _row(layer: ComparedLayer) -> tuple[str, ...]:
    planned, error = layer.planned, layer.error
    size = "unknown" if error is None else f"{error:.2g} steps" if error else "0"
    return planned.source, planned.container, size, layer.problem or "as exported"
