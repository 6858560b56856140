"""lowbit convert: a folder in somebody else's layout to one that lowbit and transformers read."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from lowbit.checkpoint.companions import WEIGHTS
from lowbit.cli.screen import console, shortened, size
from lowbit.config import unknown_name
from lowbit.convert import READERS


def convert(
    folder: Annotated[Path, Argument(metavar="DIR", help="The folder to read.")],
    out: Annotated[Path, Argument(metavar="OUT", help="The folder to write.")],
    layout: Annotated[
        str | None, Option("--from", metavar="NAME", help=f"What DIR is: {', '.join(READERS)}.")
    ] = None,
    from_bin: Annotated[
        bool,
        Option("--from-bin", help="Short for --from bin: pytorch_model.bin, read as tensors only."),
    ] = False,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Copy Python code that comes with the model.")
    ] = False,
) -> None:
    """Bring foreign weights into safetensors."""
    if from_bin == (layout is not None):
        raise ValueError(f"say once what {folder} is: --from {' | '.join(READERS)}")
    name = layout or "bin"
    if name not in READERS:
        raise ValueError(unknown_name(name, READERS, "layout to convert from"))
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: there is no such folder; from the hub: hf download NAME --local-dir DIR"
        )
    READERS[name](folder, out, trust_remote_code)
    say_what_changed(console(), folder, out)


def say_what_changed(screen: Console, folder: Path, out: Path) -> None:
    """Prints the bytes of weights before and after, and which files were not taken along."""
    before, after = weight_files(folder), weight_files(out)
    screen.print(f"{folder}: {_files(before)}", soft_wrap=True)
    screen.print(f"{out}: {_files(after)}", style="bold", soft_wrap=True)
    dropped = left_behind(folder, out)
    if dropped:
        screen.print(f"left behind: {shortened(dropped, most=8)}", soft_wrap=True)


def left_behind(folder: Path, out: Path) -> list[str]:
    """Names in `folder` that `out` lacks, weights aside: of files, and of whole folders."""
    names: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (out / path.name).is_dir():
            names += [f"{path.name}/{name}" for name in left_behind(path, out / path.name)]
        elif not (out / path.name).exists() and path.suffix not in WEIGHTS:
            names.append(path.name)
    return names


def weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in WEIGHTS)


def _files(paths: list[Path]) -> str:
    total = size(sum(path.stat().st_size for path in paths))
    return f"{total} of weights in {shortened([path.name for path in paths], most=1)}"
