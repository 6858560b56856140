"""Directory to directory: a quantized folder to a float one, foreign checkpoints in."""

from lowbit.convert.dequantize import dequantize
from lowbit.convert.from_bin import from_bin

__all__ = ["dequantize", "from_bin"]
