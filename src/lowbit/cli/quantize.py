"""lowbit quantize: quantizes a model into a folder."""

import shlex
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from lowbit.checkpoint.output import size_of
from lowbit.cli.options import JobOptions, with_job
from lowbit.cli.parameters import Model, Out
from lowbit.cli.progress import stoppable_run
from lowbit.cli.screen import console, shortened, size
from lowbit.models.locate import locate
from lowbit.pipeline import quantize as run
from lowbit.report.records import read_report
from lowbit.run_report import RunReport
from lowbit.together import index_from_environment


@with_job
def quantize(
    model: Model,
    out: Out,
    job: JobOptions,
    restart: Annotated[
        bool, Option("--restart", help="Delete an earlier run in OUT, and start over.")
    ] = False,
    dry_run_block: Annotated[
        bool | None,
        Option(
            help="Quantize one block as a dry run first, so that problems show early. Default: "
            "only if the run may take more than an hour, by a rough upper estimate from the sizes "
            "of model and text.",
        ),
    ] = None,
    worker: Annotated[
        bool,
        Option(
            "--worker",
            help="Work on OUT together with other workers, started by the same command on any "
            "machine that has the folder. Each claims blocks; only for methods whose blocks do not "
            "depend on each other.",
        ),
    ] = False,
) -> None:
    """Quantize MODEL into the folder OUT. If it is interrupted, run the same command again.

    Example: lowbit quantize meta-llama/Llama-3.2-1B out --recipe omniquant-w4a16-g128
    """
    source = locate(model, job.trust_remote_code)
    chosen = job.chosen(source, restart=restart, dry_run_block=dry_run_block)
    screen = console()
    screen.print(f"{model} → {out}: {chosen.label}", soft_wrap=True)
    chosen.warn(screen)
    same = "the same command without --restart" if restart else "the same command"
    with stoppable_run(screen, f"finished blocks are kept, {same} continues") as progress:
        options = dict(chosen.options)
        run(
            model,
            out,
            chosen.method,
            chosen.calibration,
            **options,
            worker=worker,
            on_event=progress,
        )
    if index_from_environment():  # the first process has written OUT
        return
    if progress.finished_before:
        screen.print(f"{out} was finished by an earlier run; --restart runs it again")
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
        screen.print(f"salient: {shown} of the inputs of a linear", soft_wrap=True)
    if report.dequantized:
        kinds = ", ".join(
            f"{count} tensors in {kind}" for kind, count in report.dequantized.items()
        )
        screen.print(f"dequantized while reading: {kinds}", soft_wrap=True)
    for what, names in (
        ("quantized more simply", report.fallbacks),
        ("in float", report.left_float),
    ):
        if names:
            layers = f"{len(names)} layer{'s' if len(names) > 1 else ''}"
            line = f"{what}: {layers}, see {out / 'report.json'}: "
            screen.print(line + shortened(list(names)), style="yellow", soft_wrap=True)
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
    """Returns the share of salient inputs of each linear that has any."""
    return [
        linear.salient_ratio
        for block in report.blocks.values()
        for linear in block.linears.values()
        if linear.salient_ratio is not None
    ]
