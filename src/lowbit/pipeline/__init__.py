"""A float folder in, a quantized folder out.

run.py walks over the blocks, job.py does what one visit takes, options.py what it can be told,
selection.py which linears it quantizes, head.py what it does with the output layer; results.py
turns what a method says about a block into tensors on disk and back. rehearsal.py does it all on
one block, for plan.py, which says beforehand what a run will take.
"""

from lowbit.pipeline.options import RunOptions
from lowbit.pipeline.plan import Estimate, plan
from lowbit.pipeline.run import quantize

__all__ = ["Estimate", "RunOptions", "plan", "quantize"]
