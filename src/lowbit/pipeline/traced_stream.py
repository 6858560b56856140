"""Traces when the batches of a stream are read, and how many streams exist at once."""

from collections.abc import Callable
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from lowbit.blocks import Batch, Stream
from lowbit.device import synchronize
from lowbit.pipeline.meters import Meter


class Trace:
    """Records when batches were read, and how many streams existed at once."""

    def __init__(self, device: torch.device, meter: Meter) -> None:
        self.device, self.meter = device, meter
        self.reads: list[tuple[int, Any]] = []
        self.streams = 0
        self.most_streams = 0

    def read(self, index: int) -> None:
        synchronize(self.device)  # kernels run asynchronously: wait for the last batch's
        self.reads.append((index, self.meter.now()))

    def made(self, stream: Stream) -> None:
        self.meter.leave_out(stream.hidden())
        self.streams += 1
        self.most_streams = max(self.most_streams, self.streams)
        finalize(stream, self._freed)

    def _freed(self) -> None:
        self.streams -= 1

    def per_batch(self) -> Any:
        """Returns the seconds (or counts) that one more batch would take, summed over all passes.

        Each pass over the batches counts from the read of its first batch to that of its last. So
        work that follows a pass, such as factoring a Hessian, does not count as time per batch.
        """
        total: Any = 0.0
        passes: list[dict[int, Any]] = []
        for index, moment in self.reads:
            if not passes or index < max(passes[-1]):
                passes.append({})
            passes[-1].setdefault(index, moment)
        for times in passes:
            steps = max(times) - min(times)
            total = total + (times[max(times)] - times[min(times)]) / steps if steps else 0.0
        return total


class TracedStream(Stream):
    """A stream in memory that reports its reads, and the streams made from it, to a `Trace`."""

    def __init__(self, stream: Stream, block: int, trace: Trace) -> None:
        own = stream.copy()
        super().__init__(own.hidden(), own.arguments, own.device, block=block)
        self.trace = trace
        trace.made(self)

    def __getitem__(self, index: int) -> Batch:
        self.trace.read(index)
        return super().__getitem__(index)

    def map(self, function: Callable[[Batch], Tensor]) -> Stream:
        mapped = super().map(function)
        self.trace.made(mapped)
        return mapped
