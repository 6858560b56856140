"""lowbit plan: estimates the cost of `lowbit quantize` with a dry run of one block."""

from rich.table import Table

from lowbit.checkpoint.output import size_of
from lowbit.checkpoint.writer import write_json
from lowbit.cli.options import JobOptions, with_job
from lowbit.cli.parameters import JsonFile, Model, check_writable
from lowbit.cli.screen import console, duration, shortened, size
from lowbit.models.locate import locate
from lowbit.pipeline.job import physical_memory
from lowbit.pipeline.plan import Estimate
from lowbit.pipeline.plan import plan as estimate


@with_job
def plan(
    model: Model,
    job: JobOptions,
    json: JsonFile = None,
) -> None:
    """Estimate size, memory and time of quantizing MODEL.

    One block is quantized as a dry run, and nothing is written. The options are those of lowbit
    quantize.
    """
    check_writable("--json", json)
    source = locate(model, job.trust_remote_code)
    chosen = job.chosen(source)
    screen = console()
    chosen.warn(screen)
    with screen.status("dry run of one block"):
        found = estimate(model, chosen.method, chosen.calibration, **dict(chosen.options))
    screen.print(_table(f"{model}: {chosen.label}", found, size_of(source).bytes))
    if json is not None:
        write_json(json, found.to_json())


def _table(title: str, found: Estimate, before: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    basis, streams = found.basis, found.basis["streams"]
    memory = f"{size(found.memory)} of {size(physical_memory())}"
    if streams:
        each = f"{streams['held']} times {size(streams['bytes'])}"
        memory += f", hidden states ({each}) {'on' if streams['place'] == 'disk' else 'in'} "
        memory += streams["place"]
    seconds = f"{duration(found.seconds)}, {duration(found.seconds_per_block)} per block"
    rows = {
        "bits per weight": f"{found.linears:.2f} in the linears, {found.model:.2f} in the model",
        "size": f"{size(found.bytes)} (was {size(before)})",
        "learned parameters": size(found.learned) if found.learned else "",
        "peak memory": memory,
        "peak GPU memory": size(found.device_memory) if found.device_memory else "",
        "disk during the run": size(found.disk) if found.disk else "",
        "time": f"{seconds}, on {basis['device']}",
        "choosing widths": _choosing(found),
        "derived from": _derived(found),
        "warning": found.warning or "",
    }
    for name, fact in rows.items():
        if fact:
            table.add_row(name, fact)
    return table


def _choosing(found: Estimate) -> str:
    seconds = found.basis.get("measuring_widths")
    if seconds is None:
        return ""
    return f"{duration(seconds)} of the time, to measure what each width of each linear costs"


def _derived(found: Estimate) -> str:
    basis = found.basis
    text = f"{shortened(basis['blocks'])} of {basis['of']} blocks"
    if basis["batches_of"]:
        text += f", {basis['batches']} of {basis['batches_of']} batches"
    return f"{text}, measured in {duration(basis['seconds'])}"
