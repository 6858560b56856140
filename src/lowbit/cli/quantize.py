"""lowbit quantize: a recipe or a method, a calibration text and a folder to a quantized folder."""

import shlex
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from lowbit.checkpoint.output import size_of
from lowbit.cli.options import JobOptions, with_job
from lowbit.cli.progress import stoppable_run
from lowbit.cli.screen import console, shortened, size
from lowbit.models.locate import locate
from lowbit.pipeline import quantize as run
from lowbit.report.records import read_report
from lowbit.run_report import RunReport


@with_job
def quantize(
    model: Annotated[str, Argument(metavar="MODEL", help="A folder or a hub id.")],
    out: Annotated[Path, Argument(metavar="OUT", help="The folder to write.")],
    job: JobOptions,
    restart: Annotated[bool, Option("--restart", help="Start over if OUT holds a run.")] = False,
    dry_run_block: Annotated[
        bool | None,
        Option(help="Rehearse a block first; by itself before long runs."),
    ] = None,
) -> None:
    """Make a smaller model. Stopped at any moment, the same command continues."""
    source = locate(model, job.trust_remote_code)
    chosen = job.chosen(source, restart=restart, dry_run_block=dry_run_block)
    screen = console()
    screen.print(f"{model} → {out}: {chosen.label}", soft_wrap=True)
    chosen.warn(screen)
    same = "the same command without --restart" if restart else "the same command"
    with stoppable_run(screen, f"finished blocks are kept, {same} continues") as progress:
        run(model, out, chosen.method, chosen.calibration, progress, **dict(chosen.options))
    if progress.finished_before:
        screen.print(f"{out} was finished by an earlier run; --restart does it again")
    _summary(screen, model, source, out)


def _summary(screen: Console, model: str, source: Path, out: Path) -> None:
    before, after = size_of(source), size_of(out)
    bits = f"{after.linears:.2f} bits per weight in the linears, {after.model:.2f} in the model"
    screen.print(
        f"{out}: {bits}, {size(after.bytes)} (was {size(before.bytes)})",
        style="bold",
        soft_wrap=True,
    )
    report = read_report(out)
    if ratios := _salient_ratios(report):
        least, most = min(ratios), max(ratios)
        shown = f"{least:.1%}" + (f" to {most:.1%}" if most > least else "")
        screen.print(f"salient: {shown} of a linear's inputs", soft_wrap=True)
    for what, names in (("fell back", report.fallbacks), ("left float", report.left_float)):
        if names:
            line = (
                f"{what}: {len(names)} layers, in {out / 'report.json'}: {shortened(list(names))}"
            )
            screen.print(line, style="yellow", soft_wrap=True)
    float_model, folder = shlex.quote(model), shlex.quote(str(out))
    commands = (
        f"eval {float_model} {folder}",
        f"generate {folder} 'Once upon a time'",
        f"inspect {folder}",
        f"report {folder}",
    )
    lines = "".join(f"\n  lowbit {command}" for command in commands)
    screen.print(f"next:{lines}", style="dim", soft_wrap=True)


def _salient_ratios(report: RunReport) -> list[float]:
    """The effective shares, of all linears that have salient inputs."""
    return [
        linear.salient_ratio
        for block in report.blocks.values()
        for linear in block.linears.values()
        if linear.salient_ratio is not None
    ]
