"""Does, in a dry run, what the Hessians of outputs take; see `lowbit.pipeline.output_side`."""

from typing import Any

import torch

from lowbit.blocks import Stream
from lowbit.blocks.backward import Tape
from lowbit.blocks.output_hessian import output_hessians
from lowbit.blocks.walk import Step
from lowbit.pipeline.job import Job
from lowbit.pipeline.meters import Meter


def try_gradients(job: Job, index: int, stream: Stream, meter: Meter) -> Any:
    """Passes through one block and back, with random gradients. The job then has its Hessians.

    index: the index of the block.
    stream: at the block.
    meter: what the work is measured with.

    Returns the seconds, or counts, that one more batch would have taken.
    """
    draw, amounts = torch.Generator().manual_seed(0), list[Any]()

    def visit(step: Step) -> None:
        started = meter.now()
        tape = Tape(stream.copy())
        tape.forward(step.block)
        gradients = [torch.randn(hidden.shape, generator=draw) for hidden in stream.hidden()]
        linears = [n for group in job.selection.groups(step.name) for n in group.linears]
        found = output_hessians(step.block, linears, tape, gradients)
        job.output_hessians = lambda index: found
        amounts.append((meter.now() - started) / len(stream))

    job.source.walk({}, visit, job.device, [index])
    return amounts[0]
