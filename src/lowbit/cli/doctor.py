"""lowbit doctor: shows what lowbit found on this machine."""

from rich.table import Table

from lowbit.bench.machine import Machine
from lowbit.checkpoint.writer import write_json
from lowbit.cli.parameters import JsonFile, check_writable
from lowbit.cli.screen import console
from lowbit.kernels.native.library import VARIABLE


def doctor(json: JsonFile = None) -> None:
    """Show what lowbit found on this machine.

    That is: processor, kernels, threads, versions, GPUs and extras.

    Nothing is measured; lowbit bench does that.
    """
    check_writable("--json", json)
    found = Machine.here()
    if json is not None:
        write_json(json, found.to_json())
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in _facts(found).items():
        table.add_row(name, fact)
    console().print(table)


def _facts(found: Machine) -> dict[str, str]:
    load = "" if found.load is None else f", load {found.load:.1f}"
    variable = "is not set" if found.thread_variable is None else f"is {found.thread_variable}"
    return {
        "lowbit": f"{found.lowbit} on Python {found.python}, {found.system}",
        "processor": f"{found.processor}, {found.cores} cores{load}",
        "instructions": " ".join(found.features) or "torch reports none",
        "kernels": _kernels(found),
        "threads": f"{found.threads} (OMP_NUM_THREADS {variable})",
        "torch": found.torch,
        "transformers": found.transformers,
        "GPU": ", ".join(found.gpus) or "none that torch can use",
        "GPU kernels": f"Triton {found.triton}" if found.triton else f"none: {found.why_no_triton}",
        **{f"extra {name}": _extra(name, of) for name, of in found.extras.items()},
    }


def _kernels(found: Machine) -> str:
    if found.kernels is None:
        return f"none: {found.why_not}"
    others = [name for name in found.instruction_sets if name != found.kernels]
    text = f"{found.kernels}, from {found.library}"
    if others:
        text += f"; {VARIABLE}={'|'.join([*others, 'off'])} would force another way"
    if not found.kernel_threads:
        text += "; one thread, because this version of torch does not share its threads"
    return text


def _extra(name: str, packages: dict[str, str | None]) -> str:
    missing = [package for package, version in packages.items() if version is None]
    if missing:
        return f"{', '.join(missing)} not installed: pip install 'lowbit[{name}]'"
    return ", ".join(f"{package} {version}" for package, version in packages.items())
