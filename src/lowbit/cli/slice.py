"""lowbit slice: one width, or a plan of widths, out of a folder that matquant made."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lowbit.checkpoint.output import size_of
from lowbit.cli.screen import console, size
from lowbit.convert import slice_folder
from lowbit.models.locate import locate


def cut(
    model: Annotated[str, Argument(metavar="OUT", help="A folder that matquant made.")],
    bits: Annotated[
        str, Option(metavar="2..8|PLAN", help="One width, or a YAML file as lowbit mix writes it.")
    ],
    out: Annotated[Path, Option("--output", "-o", metavar="SLICE", help="The folder to write.")],
    nested: Annotated[
        bool, Option("--nested", help="Keep the format: for a master with extra precision.")
    ] = False,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Copy Python code that comes with the model.")
    ] = False,
) -> None:
    """Write a slice of 8-bit codes as a folder of its own, in its own bits."""
    folder, screen = locate(model, trust_remote_code), console()
    with screen.status("cutting") as status:

        def progress(done: int, of: int) -> None:
            status.update(f"cutting: {done} of {of} files")

        slice_folder(
            folder,
            out,
            parse_bits(bits),
            nested,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    before, after = size_of(folder), size_of(out)
    screen.print(
        f"{out}: {after.linears:.2f} bits per weight in the linears (was {before.linears:.2f}), "
        f"{size(after.bytes)} (was {size(before.bytes)})",
        soft_wrap=True,
    )


def parse_bits(text: str) -> int | str:
    """A width, or the path of a plan."""
    text = text.strip()
    if text.isdecimal():
        return int(text)
    if not Path(text).is_file():
        raise ValueError(f"--bits {text!r} is neither a width of 2 to 8 nor the file of a plan")
    return text
