"""The only loop over blocks: a float folder in, a quantized folder out.

run.py is the loop, options.py what it can be told, selection.py which linears it quantizes, head.py
what it does with the output layer; results.py turns what a method says about a block into tensors
on disk and back.
"""

from lowbit.pipeline.options import RunOptions
from lowbit.pipeline.run import quantize

__all__ = ["RunOptions", "quantize"]
