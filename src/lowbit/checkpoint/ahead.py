"""Tells the operating system which tensors are read next, so that it fetches them meanwhile.

They come into the memory that the system keeps for files, and take none of the process's own.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowbit.checkpoint.finite import LENGTH


def read_ahead(folder: Path, files: Mapping[str, str], names: Iterable[str]) -> None:
    """Lets the system fetch the named tensors; does nothing where it cannot.

    files: the name of the safetensors file of each tensor, by the tensor's name.
    """
    if not hasattr(os, "posix_fadvise"):  # Windows and macOS
        return
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_file[files[name]].append(name)
    for file, wanted in by_file.items():
        with suppress(OSError), (folder / file).open("rb", buffering=0) as opened:
            length = int.from_bytes(opened.read(LENGTH), "little")
            header: dict[str, Any] = json.loads(opened.read(length))
            for name in wanted:
                begin, end = header[name]["data_offsets"]
                place = LENGTH + length + begin
                os.posix_fadvise(opened.fileno(), place, end - begin, os.POSIX_FADV_WILLNEED)
