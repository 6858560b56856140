"""lowbit slice: cuts a MatQuant model to one width, or to one width for each layer."""

import os
from pathlib import Path
from typing import Annotated

from typer import Option

from lowbit.checkpoint.output import size_of
from lowbit.cli.parameters import CopyCode, MatQuantModel
from lowbit.cli.screen import console, size
from lowbit.convert import slice_folder
from lowbit.models.locate import locate
from lowbit.parsing import shorten

LONGEST_WIDTH = 9  # digits; Python refuses to read thousands


def cut(
    model: MatQuantModel,
    bits: Annotated[
        str,
        Option(
            metavar="2..8|PLAN",
            help="Bits of each weight, or a YAML file of lowbit mix with a width for each layer.",
        ),
    ],
    out: Annotated[
        Path,
        Option("--output", "-o", metavar="OUT", help="Folder to write, which must not exist."),
    ],
    nested: Annotated[
        bool,
        Option(
            "--nested",
            help="Keep the layout in which several widths share codes; required if the model was "
            "made with extra_precision and the slice uses it.",
        ),
    ] = False,
    trust_remote_code: CopyCode = False,
) -> None:
    """Write a MatQuant model as a plain folder of lower bit width."""
    folder, screen = locate(model, trust_remote_code), console()
    with screen.status("cutting") as status:

        def progress(done: int, of: int) -> None:
            status.update(f"cutting: {done} of {of} files")

        slice_folder(
            folder,
            out,
            parse_bits(bits),
            nested=nested,
            trust_remote_code=trust_remote_code,
            on_progress=progress,
        )
    before, after = size_of(folder), size_of(out)
    screen.print(
        f"{out}: {after.linears:.2f} bits per weight in the linears (was {before.linears:.2f}), "
        f"{size(after.bytes)} (was {size(before.bytes)})",
        soft_wrap=True,
    )


def parse_bits(text: str) -> int | str:
    """Parses --bits: a width, or the path of a YAML file with a width for each layer."""
    text = text.strip()
    if text.isdecimal() and len(text) <= LONGEST_WIDTH:
        return int(text)
    if not os.path.isfile(text):  # False for a name that no file can have
        raise ValueError(f"--bits {shorten(text)!r} is neither a width from 2 to 8 nor a file")
    return text
