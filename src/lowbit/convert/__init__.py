"""Converts folders: quantized to float, 8-bit codes to a slice, and other programs' checkpoints."""

from lowbit.convert.dequantize import dequantize
from lowbit.convert.from_bin import from_bin
from lowbit.convert.from_quip import from_quip
from lowbit.convert.layouts import READERS, convert
from lowbit.convert.slice import slice_folder

__all__ = ["READERS", "convert", "dequantize", "from_bin", "from_quip", "slice_folder"]
