"""A run on a few blocks and a few windows, into a folder that goes away.

It shows that method, pack and disk work, and measures what `plan` reckons with.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from lowbit.blocks import Batch, Stream
from lowbit.blocks.walk import Step
from lowbit.calibration import TokenWindows
from lowbit.checkpoint import CheckpointReader, CheckpointWriter
from lowbit.checkpoint.reader import TensorInfo
from lowbit.events import Event
from lowbit.methods.result import BlockResult
from lowbit.pipeline.job import Job
from lowbit.pipeline.memory import PeakMemory
from lowbit.pipeline.results import result_of

BATCHES = 4  # of each stream: the fewest whose first, slowest one does not rule the mean
BRIEF = 10.0  # seconds: what takes less is done twice; the first was cold, either may have waited
HASHED = 1 << 26  # bytes that tell how fast files are hashed


# Shape and dtype on disk, the method's settings for it, the place in its group: what is equal in
# all of them is stored in equally many bytes, as far as the data have no say.
LinearKind = tuple[tuple[int, ...], torch.dtype, str, int]
Kinds = Mapping[str, LinearKind]  # by the linear's name on disk; of one block


@dataclass(frozen=True)
class Stage:
    """What a part of the run took. memory, device_memory: bytes at their highest, of the process
    and of a CUDA device. per_batch: seconds that one more batch would have taken."""

    seconds: float
    memory: int
    device_memory: int | None = None
    per_batch: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One block loaded, quantized, written and left behind by all streams.

    fixed, per_batch, per_epoch: seconds = fixed + batches * (per_batch + epochs * per_epoch).
    memory: without the hidden states. held: how many streams there were at most, targets included.
    record: what was recorded with its shard. learned: bytes of what was learned.
    """

    fixed: float
    per_batch: float
    per_epoch: float
    memory: int
    device_memory: int | None
    held: int
    record: dict[str, Any]
    learned: int

    def seconds(self, batches: int, epochs: int) -> float:
        return self.fixed + batches * (self.per_batch + epochs * self.per_epoch)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """batches: how many windows made one, and how many there were. hashing: seconds per byte.

    outside: embeddings and output layer written, as outside_tensors; outside_record goes with them.
    capture: the first block's inputs made, memory without them; None without streams. kinds: of
    all blocks. trials: by the index of the block.
    """

    batches: int
    hashing: float
    outside: Stage
    outside_tensors: dict[str, TensorInfo]
    outside_record: dict[str, Any]
    capture: Stage | None
    kinds: list[Kinds]
    trials: dict[int, Trial]


def rehearse(job: Job, windows: TokenWindows | None) -> Rehearsal:
    """Does all that the run will do, on `chosen_blocks` and BATCHES batches.

    Raises what the run would raise, and ValueError when a block computes something else once it has
    been written and read back.
    """
    tokens = windows.tokens[: BATCHES * job.method.windows_per_batch()] if windows else None
    kinds = linear_kinds(job)
    with (
        TemporaryDirectory(prefix="lowbit-rehearsal-") as folder,
        CheckpointWriter(Path(folder) / "out", {}, job.shards) as writer,
    ):
        hashing = _hashing(job.source.folder / job.source.reader.files[0])
        with _measured(job) as outside:
            job.write_outside(writer)
        stream, capture = _captured(job, tokens)
        trials = {index: _rehearsed(job, writer, index, stream) for index in chosen_blocks(kinds)}
        record = writer.record(0)
        assert record is not None
        written = CheckpointReader.of_file(writer.folder / record["file"]).tensors
        return Rehearsal(
            batches=len(stream) if stream else 0,
            hashing=hashing,
            outside=outside[0],
            outside_tensors=written,
            outside_record=record,
            capture=capture,
            kinds=kinds,
            trials=trials,
        )


def linear_kinds(job: Job) -> list[Kinds]:
    """Block by block, the linears that the run quantizes."""
    found: list[Kinds] = []
    for block in job.blocks:
        kinds: dict[str, LinearKind] = {}
        for group in job.selection.groups(block):
            for place, linear in enumerate(group.linears):
                name = f"{block}.{linear}"
                disk = job.source.disk_name(name)
                info = job.source.reader.tensors[f"{disk}.weight"]
                settings = job.method.at(name).model_dump_json(exclude={"overrides"})
                kinds[disk] = (info.shape, info.dtype, settings, place)
        found.append(kinds)
    return found


def weights_in(kinds: Kinds) -> int:
    """How many weights of a block are quantized."""
    return sum(math.prod(shape) for shape, *_ in kinds.values())


def chosen_blocks(kinds: Sequence[Kinds]) -> list[int]:
    """The largest block, and further ones until every kind of linear occurs in one."""
    by_size = sorted(range(len(kinds)), key=lambda i: -weights_in(kinds[i]))
    chosen: list[int] = []
    known: set[LinearKind] = set()
    for index in by_size:
        found = set(kinds[index].values())
        if not chosen or not found <= known:
            chosen.append(index)
            known |= found
    return chosen


def _hashing(path: Path) -> float:
    started = time.perf_counter()
    with path.open("rb") as file:
        data = file.read(HASHED)
    hashlib.sha256(data)
    return (time.perf_counter() - started) / len(data)


@contextmanager
def _measured(job: Job) -> Iterator[list[Stage]]:
    """The list has one member once this is left."""
    stages: list[Stage] = []
    started = time.perf_counter()
    with PeakMemory(job.device) as peak:
        yield stages
    seconds = time.perf_counter() - started
    stages.append(Stage(seconds, peak.found["memory"], peak.found.get("device_memory")))


def _captured(job: Job, tokens: Tensor | None) -> tuple[Stream | None, Stage | None]:
    if tokens is None:
        return None, None
    moments: list[float] = []

    def batches() -> Iterator[Tensor]:
        for batch in tokens.split(job.method.windows_per_batch()):
            moments.append(time.perf_counter())
            yield batch

    with _measured(job) as whole:
        stream = job.source.first_stream(batches(), job.device)
        moments.append(time.perf_counter())
    per_batch = (moments[-1] - moments[0]) / len(stream)
    memory = whole[0].memory - stream.bytes
    return stream, Stage(whole[0].seconds, memory, None, per_batch)


def _rehearsed(job: Job, writer: CheckpointWriter, index: int, stream: Stream | None) -> Trial:
    """With no and with one epoch, where the method has epochs: the difference is an epoch."""
    epochs = getattr(job.method, "epochs", 0)
    counts = sorted({0, min(epochs, 1)})
    attempts = []
    for count in counts:
        known = job.with_epochs(count) if epochs else job
        attempt = _attempt(known, writer, index, stream)
        if attempt.stage.seconds < BRIEF:
            again = _attempt(known, writer, index, stream)
            attempt = min(attempt, again, key=lambda tried: tried.stage.seconds)
        attempts.append(attempt)
    least, most = attempts[0].stage, attempts[-1].stage
    _check_read_back(job, writer, index, attempts[-1].result)
    record = writer.record(index + 1)
    assert record is not None
    learned = writer.folder / "learned" / record["file"]
    # The hidden states that were captured are there besides those of the streams.
    batches = len(stream) if stream else 0
    small = stream.bytes * (attempts[-1].held + 1) if stream else 0
    device = [a.stage.device_memory for a in attempts if a.stage.device_memory is not None]
    return Trial(
        fixed=max(0.0, most.seconds - batches * most.per_batch),
        per_batch=least.per_batch,
        per_epoch=max(0.0, most.per_batch - least.per_batch),
        memory=max(a.stage.memory for a in attempts) - small,
        device_memory=max(device) if device else None,
        held=attempts[-1].held,
        record=record,
        learned=learned.stat().st_size if learned.exists() else 0,
    )


@dataclass(frozen=True)
class _Attempt:
    stage: Stage
    held: int
    result: BlockResult


def _attempt(job: Job, writer: CheckpointWriter, index: int, stream: Stream | None) -> _Attempt:
    """The hidden states of the first block stand for those of every other."""
    trace = _Trace(job.device)
    streams: dict[str, Stream] = {}
    if stream is not None:
        streams = {name: _Traced(stream, index, trace) for name in job.method.streams()}
    results: list[BlockResult] = []

    def visit(step: Step) -> None:
        results.append(job.quantize_block(writer, step, _ignore))
        job.advance(step, results[0])

    with _measured(job) as stages:
        job.source.walk(streams, visit, job.device, [index])
    stage = stages[0]
    found = Stage(stage.seconds, stage.memory, stage.device_memory, trace.per_batch())
    return _Attempt(found, trace.most, results[0])


def _ignore(event: Event) -> None:
    """The run will say it again."""


class _Trace:
    """When batches were read, and how many streams there were at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reads: list[tuple[int, float]] = []
        self.held = 0
        self.most = 0

    def read(self, index: int) -> None:
        if self.device.type == "cuda":  # what was begun must have been done
            torch.cuda.synchronize(self.device)
        self.reads.append((index, time.perf_counter()))

    def made(self, stream: Stream) -> None:
        self.held += 1
        self.most = max(self.most, self.held)
        finalize(stream, self._gone)

    def _gone(self) -> None:
        self.held -= 1

    def per_batch(self) -> float:
        """Seconds for one more batch: of every pass, from its first batch to its last.

        What happens after a pass, such as factoring a Hessian, is thus not taken for the batches'.
        """
        total = 0.0
        passes: list[dict[int, float]] = []
        for index, moment in self.reads:
            if not passes or index < max(passes[-1]):
                passes.append({})
            passes[-1].setdefault(index, moment)
        for times in passes:
            steps = max(times) - min(times)
            total += (times[max(times)] - times[min(times)]) / steps if steps else 0.0
        return total


class _Traced(Stream):
    """A stream in memory that leaves its traces."""

    def __init__(self, stream: Stream, block: int, trace: _Trace) -> None:
        own = stream.copy()
        super().__init__(own.hidden(), own.arguments, own.device, block=block)
        self.trace = trace
        trace.made(self)

    def __getitem__(self, index: int) -> Batch:
        self.trace.read(index)
        return super().__getitem__(index)

    def map(self, function: Callable[[Batch], Tensor]) -> Stream:
        made = super().map(function)
        self.trace.made(made)
        return made


def _check_read_back(job: Job, writer: CheckpointWriter, index: int, result: BlockResult) -> None:
    record = writer.record(index + 1)
    assert record is not None
    found = result_of(writer.read_shard(index + 1), record, job.source)
    wrong = [name for name, linear in result.linears.items() if not _equal(linear, found, name)]
    wrong += [n for n, t in result.tensors.items() if not torch.equal(t.cpu(), found.tensors[n])]
    wrong += [] if result.attention == found.attention else sorted(result.attention)
    if wrong:
        raise ValueError(
            f"{job.blocks[index]}.{wrong[0]} computes something else once it has been written and "
            "read back: this is an error of lowbit, please report it"
        )


def _equal(linear: nn.Module, found: BlockResult, name: str) -> bool:
    """Whether two layers give the same for the same inputs."""
    read = found.linears[name]
    device = next(linear.parameters()).device
    generator = torch.Generator().manual_seed(0)
    columns: Any = linear.in_features
    x = torch.randn(2, columns, generator=generator).to(device)
    with torch.no_grad():
        return torch.equal(linear(x), read.to(device)(x))
