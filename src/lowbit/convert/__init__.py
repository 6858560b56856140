"""Directory to directory: a quantized folder to a float one or a slice, foreign checkpoints in."""

from pathlib import Path
from typing import Protocol

from lowbit.convert.dequantize import dequantize
from lowbit.convert.from_bin import from_bin
from lowbit.convert.from_quip import from_quip
from lowbit.convert.slice import slice_folder


class Reader(Protocol):
    """Reads a folder in another layout and writes it as `out`, which it returns."""

    def __call__(self, folder: Path, out: Path, trust_remote_code: bool = False) -> Path: ...


READERS: dict[str, Reader] = {"bin": from_bin, "quip": from_quip}

__all__ = ["READERS", "dequantize", "from_bin", "from_quip", "slice_folder"]
