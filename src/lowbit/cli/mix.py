"""lowbit mix: chooses a width for each layer of a MatQuant model."""

from pathlib import Path
from typing import Annotated

from typer import Option

from lowbit.allocate import STRATEGIES, Mix
from lowbit.allocate import mix as allocate
from lowbit.calibration import Calibration
from lowbit.cli.device import device_map
from lowbit.cli.options import warn_of_unused
from lowbit.cli.parameters import (
    Devices,
    MatQuantModel,
    TrustRemoteCode,
    calibration_option,
    check_writable,
    meaning,
)
from lowbit.cli.screen import console, counting_bar, size

WINDOWS = 4  # of text to measure on


def mix(  # noqa: PLR0913 (a command's options)
    model: MatQuantModel,
    budget: Annotated[
        str,
        Option(
            metavar="BITS|SIZE",
            help="Bits per weight of the linears, scales included, such as 3.2; or the size of "
            "the whole model, such as 2.1GB.",
        ),
    ],
    out: Annotated[Path, Option("--output", "-o", metavar="PLAN", help="YAML file to write.")],
    strategy: Annotated[
        str,
        Option(
            metavar="|".join(STRATEGIES),
            help="How widths are chosen. sensitivity: measure on text how much each layer "
            "suffers; pyramid: more bits in the middle, nothing measured.",
        ),
    ] = "sensitivity",
    widths: Annotated[
        str | None,
        Option(
            metavar="BITS,...",
            help="Widths that layers may have, from 2 to 8. Default: 8,6,4,3,2 for sensitivity, "
            "8,4,2 for pyramid.",
        ),
    ] = None,
    calibration: Annotated[list[str] | None, calibration_option("wikitext2")] = None,
    samples: Annotated[int, Option(help=meaning(Calibration, "samples"))] = WINDOWS,
    seqlen: Annotated[
        int | None,
        Option(help="Tokens in a window. Default: 512, or the model's context if it is shorter."),
    ] = None,
    seed: Annotated[int, Option(help="Seed of the choice of windows.")] = 0,
    device: Devices = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Choose each layer's bit width so that the model fits a budget.

    MODEL is a MatQuant model. The widths are written to a YAML plan, which the option --bits of
    lowbit eval and lowbit slice takes.
    """
    check_writable("-o", out)
    if strategy == "pyramid":
        given = {"--calibration": calibration, "--seqlen": seqlen, "--seed": seed}
        given["--samples"] = samples != WINDOWS
        unused = [name for name in given if given[name]]
        warn_of_unused(console(), unused, "pyramid measures nothing")
    sources = {"sources": tuple(calibration)} if calibration else {}
    text = Calibration(samples=samples, seqlen=seqlen, seed=seed, **sources)
    with counting_bar() as bar:
        task = bar.add_task("measuring", total=None)
        found = allocate(
            model,
            budget,
            strategy=strategy,
            widths=_widths(widths),
            calibration=text,
            device_map=device_map(device),
            trust_remote_code=trust_remote_code,
            on_progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
    found.write(out)
    for line in _lines(found, out):
        console().print(line, soft_wrap=True)


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--widths {text!r}: allowed are numbers from 2 to 8, such as 8,4,2")
    return tuple(int(part) for part in parts)


def _lines(found: Mix, out: Path) -> list[str]:
    shares = ", ".join(f"{n} at {width} bits" for width, n in found.layers.items() if n)
    lines = [
        f"{out}: {found.linears:.3f} bits per weight in the linears, {size(found.bytes)}",
        f"layers: {shares}",
    ]
    if found.predicted is not None:
        lines.append(
            f"predicted loss: {found.predicted:.4g} nats per token (KL from the model at 8 bits, "
            "the sum over layers that were measured one by one)"
        )
    return lines
