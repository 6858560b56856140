"""Directory to directory: a quantized folder to a float one or a slice, foreign checkpoints in."""

from collections.abc import Callable
from pathlib import Path

from lowbit.convert.dequantize import dequantize
from lowbit.convert.from_bin import from_bin
from lowbit.convert.from_quip import from_quip
from lowbit.convert.slice import slice_folder

# What other folders can be read as: a function of that folder and of the one to write.
READERS: dict[str, Callable[[Path, Path], Path]] = {"bin": from_bin, "quip": from_quip}

__all__ = ["READERS", "dequantize", "from_bin", "from_quip", "slice_folder"]
