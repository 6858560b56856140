"""Does, in a dry run, what the Hessians of outputs take; see `lowbit.pipeline.output_side`."""

import time

import torch

from lowbit.blocks import Stream
from lowbit.blocks.backward import Tape
from lowbit.blocks.output_hessian import output_hessians
from lowbit.blocks.walk import Step
from lowbit.pipeline.job import Job


def try_gradients(job: Job, index: int, stream: Stream) -> float:
    """Passes through one block and back, with random gradients. The job then has its Hessians.

    index: the index of the block.
    stream: at the block.

    Returns the seconds that one more batch would have taken.
    """
    draw, seconds = torch.Generator().manual_seed(0), list[float]()

    def visit(step: Step) -> None:
        started = time.perf_counter()
        tape = Tape(stream.copy())
        tape.forward(step.block)
        gradients = [torch.randn(hidden.shape, generator=draw) for hidden in stream.hidden()]
        linears = [n for group in job.selection.groups(step.name) for n in group.linears]
        found = output_hessians(step.block, linears, tape, gradients)
        job.output_hessians = lambda index: found
        seconds.append((time.perf_counter() - started) / len(stream))

    job.source.walk({}, visit, job.device, [index])
    return seconds[0]
