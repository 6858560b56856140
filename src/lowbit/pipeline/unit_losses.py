"""Measures the loss of every unit of a job, linears that share a width, at several widths.

The method itself rounds the linears of a block, with its settings for speed (`Method.rough`), on
some windows of the calibration text. The losses are those of other windows, on which nothing was
rounded. `lowbit.allocate.branches` computes them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lowbit.allocate.branches import AT_ONCE, Branch, Branches
from lowbit.allocate.units import Unit
from lowbit.blocks import BlockTask, Stream
from lowbit.blocks.capture import call_block
from lowbit.blocks.walk import Step
from lowbit.config import Config
from lowbit.events import BlockLog, Event
from lowbit.methods import Method
from lowbit.models.sizes import vocabulary_of
from lowbit.models.streamed import Progress
from lowbit.pipeline.job import Job

TENSOR_HEADER = 96  # most bytes of a tensor in a shard's header, besides its name
TRAINED = ("sign_in", "sign_out")  # tensors that a layer has if its signs are trained


@dataclass(frozen=True)
class Text:
    """The calibration text on which losses are measured.

    measured: (windows, tokens) int64, the windows of the losses.
    rounding: (windows, tokens) int64, the windows that the method reads; there may be none.
    """

    measured: Tensor
    rounding: Tensor


class UnitLosses(Config):
    """What was measured."""

    losses: list[dict[float, Annotated[float, Field(ge=0, allow_inf_nan=False)]]] = Field(
        description="The loss in nats by width, for each unit."
    )
    header: int = Field(
        ge=0,
        description="Most bytes that the rounded linears take in the headers of shards.",
    )
    seconds: float = Field(ge=0, description="Seconds that it took.")


def unit_losses(
    job: Job,
    units: Sequence[Unit],
    methods: Mapping[float, Method],
    text: Text,
    folder: Path | None = None,
    progress: Progress = lambda done, of: None,
) -> UnitLosses:
    """Measures the loss of each unit at each width, all other linears in float.

    job: the model, the selection of its linears, and the device.
    units: the units, whose layers are names in memory.
    methods: the method with the width at which its linears are rounded, by width.
    folder: where hidden states are kept; None: in memory.
    progress: called as progress(done, total), in batches that ran through a block.
    """
    measured = job.first_stream(text.measured.split(AT_ONCE), False, folder and folder / "float")
    steps, total = count(1), branch_batches(job, units, len(methods)) * len(measured)
    branches = Branches(text.measured, measured, folder, lambda: progress(next(steps), total))
    streams = {"measured": measured}
    if len(text.rounding):
        batches = text.rounding.split(next(iter(methods.values())).windows_per_batch())
        streams["rounding"] = job.first_stream(batches, False, folder and folder / "rounding")
    headers: dict[str, int] = {}
    trains = getattr(job.method, "finetune_epochs", 0) > 0

    def visit(step: Step) -> None:
        branches.advance(step.block)
        task = task_of(job, step, streams.get("rounding"))
        for width, method in methods.items():
            result = job.rounded(task, method) if task.groups else None
            if result is None:
                continue
            for name, layer in result.linears.items():
                disk = job.source.disk_name(f"{step.name}.{name}")
                keys = [*layer.state_dict(), *(TRAINED if trains else ())]
                size = sum(TENSOR_HEADER + len(f"{disk}.{key}") for key in keys)
                headers[disk] = max(size, headers.get(disk, 0))
            for index, unit in enumerate(units):
                if unit.block == step.index:
                    inside = [name.removeprefix(f"{step.name}.") for name in unit.layers]
                    linears = {name: result.linears[name] for name in inside}
                    branches.open(Branch(index, width), step.block, linears)
        step.advance()

    started = time.perf_counter()
    job.source.walk(streams, visit, job.device)
    outside = job.source.without_blocks(job.device)
    found = branches.losses(outside, vocabulary_of(job.source.config))
    losses = [{w: found[Branch(i, w)] for w in methods} for i in range(len(units))]
    seconds = time.perf_counter() - started
    return UnitLosses(losses=losses, header=sum(headers.values()), seconds=round(seconds, 1))


def estimated_seconds(
    job: Job, units: Sequence[Unit], methods: Mapping[float, Method], text: Text
) -> float:
    """Estimates the seconds of `unit_losses` from rounding the first block, and running it once.

    The arguments are those of `unit_losses`. The output layer is left out.
    """
    name = job.blocks[0]
    block = job.source.load_block(name, job.device)
    stream = job.first_stream(text.measured[:AT_ONCE].split(AT_ONCE), False)
    rounding = None
    if len(text.rounding):
        size = next(iter(methods.values())).windows_per_batch()
        rounding = job.first_stream(text.rounding.split(size), False)
    task = task_of(job, Step(index=0, name=name, block=block, streams={}), rounding)
    started = time.perf_counter()
    if task.groups:
        for method in methods.values():
            job.rounded(task, method)
    each_block = time.perf_counter() - started
    with torch.no_grad():
        call_block(block, stream[0])
    each_batch = time.perf_counter() - started - each_block
    batches = branch_batches(job, units, len(methods)) * -(-len(text.measured) // AT_ONCE)
    return each_block * len(job.blocks) + each_batch * batches


def task_of(job: Job, step: Step, rounding: Stream | None) -> BlockTask:
    """Returns the task of a block for the rough method.

    Without folds a method changes nothing but linears, so that each can be put into the float
    block alone. All its streams are that of the float model.
    """
    streams = {name: rounding for name in job.method.streams()} if rounding is not None else {}
    of = len(job.blocks)
    return BlockTask(
        name=step.name,
        block=step.block,
        groups=job.selection.groups(step.name),
        folds=(),
        streams=streams,
        seed=job.calibration.seed,
        log=BlockLog(emit=_ignore, block=step.name, index=step.index, of=of),
        attentions=job.source.attentions(step.name),
    )


def _ignore(event: Event) -> None:
    """Drops an event: the run that follows reports the same of its own linears."""


def branch_batches(job: Job, units: Sequence[Unit], widths: int) -> int:
    """Returns through how many blocks all branches run together."""
    blocks = len(job.blocks)
    return widths * sum(blocks - unit.block for unit in units if unit.block is not None)
