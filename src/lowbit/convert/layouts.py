"""Checkpoints in layouts of other programs, by the name of the layout."""

from collections.abc import Callable
from pathlib import Path

from lowbit.config import unknown_name
from lowbit.convert.from_bin import from_bin
from lowbit.convert.from_quip import from_quip

# Each reads a folder, writes another one and returns it; True: Python code is copied too.
READERS: dict[str, Callable[[Path, Path, bool], Path]] = {"bin": from_bin, "quip": from_quip}


def convert(
    folder: str | Path, out: str | Path, layout: str, trust_remote_code: bool = False
) -> Path:
    """Writes a checkpoint of another layout as one that lowbit and transformers read.

    folder: the folder to read.
    out: the folder to write, which must not exist, and which is returned.
    layout: "bin": pytorch_model.bin, of which only tensors are read, no other pickled objects.
        "quip": what QuIP-for-all or AutoQuIP wrote.
    trust_remote_code: whether Python code that comes with the model is copied.

    Raises ValueError for an unknown layout, and for a folder that is not of that layout.
    """
    folder, out = Path(folder), Path(out)
    if layout not in READERS:
        raise ValueError(unknown_name(layout, READERS, "layout to convert from"))
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: there is no such folder; from the hub: hf download NAME --local-dir DIR"
        )
    return READERS[layout](folder, out, trust_remote_code)
