"""lowbit mix: a width for each layer of a folder that matquant made, within a budget."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lowbit.allocate import STRATEGIES, Mix
from lowbit.allocate import mix as allocate
from lowbit.calibration import Calibration
from lowbit.cli.device import device_map
from lowbit.cli.screen import console, counting_bar, size
from lowbit.models.locate import locate


def mix(  # noqa: PLR0913 (a command's options)
    model: Annotated[str, Argument(metavar="OUT", help="A folder that matquant made.")],
    budget: Annotated[
        str,
        Option(metavar="BITS|SIZE", help="3.2 bits per weight of the linears, or 2.1GB in all."),
    ],
    out: Annotated[Path, Option("--output", "-o", metavar="PLAN", help="The YAML file to write.")],
    strategy: Annotated[
        str, Option(metavar="|".join(STRATEGIES), help="By place, or by what is measured.")
    ] = "sensitivity",
    widths: Annotated[
        str | None, Option(metavar="8,6,4,3,2", help="Those allowed.  (pyramid: 8,4,2)")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        Option(metavar="NAME|FILE", help="Text to measure on, as for quantize; repeatable."),
    ] = None,
    samples: Annotated[int, Option(help="Windows of it.")] = 4,
    seqlen: Annotated[int | None, Option(help="Tokens in a window.  [512]")] = None,
    seed: Annotated[int, Option(help="Of the choice of windows.")] = 0,
    device: Annotated[str, Option(metavar="cpu|cuda:N|auto")] = "auto",
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Choose a width for each layer within a budget of bits or bytes."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"-o {out}: that is a folder, or in a folder that does not exist")
    sources = {"sources": tuple(calibration)} if calibration else {}
    text = Calibration(samples=samples, seqlen=seqlen, seed=seed, **sources)
    folder = locate(model, trust_remote_code)
    with counting_bar() as bar:
        task = bar.add_task("measuring", total=None)
        found = allocate(
            folder,
            budget,
            strategy,
            _widths(widths),
            text,
            device_map(device),
            trust_remote_code,
            lambda done, of: bar.update(task, completed=done, total=of),
        )
    found.write(out)
    for line in _said(found, out):
        console().print(line, soft_wrap=True)


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--widths {text!r}: allowed are numbers from 2 to 8, as 8,4,2")
    return tuple(int(part) for part in parts)


def _said(found: Mix, out: Path) -> list[str]:
    shares = ", ".join(f"{n} at {width} bits" for width, n in found.layers.items() if n)
    lines = [
        f"{out}: {found.linears:.3f} bits per weight in the linears, {size(found.bytes)}",
        f"layers: {shares}",
    ]
    if found.predicted is not None:
        lines.append(
            f"predicted loss: {found.predicted:.4g} nats a token (KL from the 8-bit master, each "
            "unit measured alone and added up)"
        )
    return lines
