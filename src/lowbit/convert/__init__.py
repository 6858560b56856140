"""Directory to directory: a quantized folder to a float one or a slice, foreign checkpoints in."""

from lowbit.convert.dequantize import dequantize
from lowbit.convert.from_bin import from_bin
from lowbit.convert.from_quip import from_quip
from lowbit.convert.layouts import READERS, convert
from lowbit.convert.slice import slice_folder

__all__ = ["READERS", "convert", "dequantize", "from_bin", "from_quip", "slice_folder"]
