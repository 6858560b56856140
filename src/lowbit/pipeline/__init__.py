"""The only loop over blocks: a float folder in, a quantized folder out.

run.py is the loop, results.py turns what a method says about a block into tensors on disk and back.
"""

from lowbit.pipeline.run import RunOptions, quantize

__all__ = ["RunOptions", "quantize"]
