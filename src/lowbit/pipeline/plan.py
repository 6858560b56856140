"""What a run will take, before it is begun: bits, bytes, memory and time; see `plan`."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from torch import nn

from lowbit.calibration import Calibration, TokenIds, TokenWindows
from lowbit.calibration.token_ids import Rows
from lowbit.formats import use_backend
from lowbit.methods import Method
from lowbit.models.in_memory import as_folder
from lowbit.pipeline.job import Job
from lowbit.pipeline.options import Place, RunOptions
from lowbit.pipeline.rehearsal import (
    LinearKind,
    Rehearsal,
    Trial,
    linear_kinds,
    rehearse,
    weights_in,
)

LONG = 3600.0  # seconds: a run that may take longer is rehearsed first
# Slower than nearly every machine: operations of matrix products per second, and seconds for every
# weight in a method that reads text. One core of a server's processor was measured at 3e10, and at
# 6e-6 with QuIP#, 7e-7 with GPTQ; rounding to nearest, without text, takes 3e-8.
SLOWEST = {"cpu": (1e10, 1e-5), "cuda": (2e12, 1e-6)}
WITHOUT_TEXT = 0.01  # of the time per weight
PASSES_PER_EPOCH = 4  # forward, backward (twice as much) and the loss afterwards


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    linears: bits per weight of the quantized linears, biases not counted. model: bits per parameter
    of everything. bytes: of all shards. learned: bytes of OUT/learned, which the model does not
    need. memory: of the process, without files that it has mapped, at its highest; device_memory:
    of a CUDA device. seconds: in all; seconds_per_block: the mean. basis: what it was derived from.
    """

    linears: float
    model: float
    bytes: int
    learned: int
    memory: int
    device_memory: int | None
    seconds: float
    seconds_per_block: float
    basis: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@use_backend("reference")
def plan(  # noqa: PLR0913 (the options of a run)
    model: str | Path | nn.Module,
    method: Method,
    calibration: Calibration | TokenIds | Rows | None = None,
    *,
    tokenizer: Any = None,
    device: str = "auto",
    restart: bool = False,
    streams: Place = "auto",
    allow_float: Sequence[str] = (),
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    lm_head_bits: int | None = None,
    start_from: str | Path | None = None,
    dry_run_block: bool | None = None,
    trust_remote_code: bool = False,
    cache: str | Path | None = None,
    recipe: str | None = None,
) -> Estimate:
    """Estimates size, memory and time of `quantize` from a dry run of one block; writes no model.

    All arguments are those of `lowbit.quantize`, so that the same keywords serve both.

    Raises ValueError, or runs out of memory, where the run would.
    """
    options = RunOptions.of(locals())
    started = time.perf_counter()
    with as_folder(model, tokenizer, Path(gettempdir()) / "lowbit-plan") as folder:
        job = Job(folder, method, calibration, options)
        windows = job.windows()
        return estimate(job, windows, time.perf_counter() - started)


def estimate(job: Job, windows: TokenWindows | None, begun: float = 0.0) -> Estimate:
    """The plan of a job; `begun`: seconds that its beginning took, the windows included."""
    started = time.perf_counter()
    found = rehearse(job, windows)
    rehearsed = time.perf_counter() - started
    nearest = [_nearest(found, index) for index in range(len(job.blocks))]
    batches = math.ceil(len(windows.tokens) / job.method.windows_per_batch()) if windows else 0
    epochs = getattr(job.method, "epochs", 0)
    blocks = sum(share * trial.seconds(batches, epochs) for trial, share in nearest)
    streams = _streams(job, found, windows)
    device = [t.device_memory for t in found.trials.values() if t.device_memory is not None]
    return Estimate(
        **_sizes(job, found, nearest),
        memory=_memory(found, streams),
        device_memory=max(device) if device else None,
        seconds=begun + _seconds_outside(job, found, batches) + blocks,
        seconds_per_block=blocks / len(job.blocks),
        basis={
            "blocks": [job.blocks[index] for index in found.trials],
            "of": len(job.blocks),
            "batches": found.batches,
            "batches_of": batches,
            "device": str(job.device),
            "seconds": rehearsed,
            "streams": streams,
        },
    )


def _seconds_outside(job: Job, found: Rehearsal, batches: int) -> float:
    """For all but the blocks: hashing the model, what is in no block, the first inputs."""
    model = sum(info.bytes for info in job.source.reader.tensors.values())
    seconds = found.outside.seconds + found.hashing * model
    if found.capture:
        seconds += found.capture.seconds
        seconds += (batches - found.batches) * found.capture.per_batch
    return seconds


def longest(job: Job, windows: TokenWindows | None) -> float:
    """Seconds that the run may take at most, by the size of model and text alone."""
    operations, per_weight = SLOWEST[job.device.type]
    weights = sum(weights_in(kinds) for kinds in linear_kinds(job))
    if windows is None:
        return weights * per_weight * WITHOUT_TEXT
    tokens = windows.tokens.numel()
    passes = 2 * len(job.method.streams()) + PASSES_PER_EPOCH * getattr(job.method, "epochs", 0)
    return weights * (per_weight + 2 * tokens * passes / operations)


def _nearest(found: Rehearsal, index: int) -> tuple[Trial, float]:
    """The trial of the block most like this one, and how much larger this one is."""
    kinds = found.kinds[index]

    def common(other: int) -> tuple[bool, int]:
        return other == index, len({*kinds.values()} & {*found.kinds[other].values()})

    nearest = max(found.trials, key=common)
    return found.trials[nearest], weights_in(kinds) / weights_in(found.kinds[nearest])


def _streams(job: Job, found: Rehearsal, windows: TokenWindows | None) -> dict[str, Any] | None:
    """Where the hidden states will be, how many at once and what one of them takes."""
    if windows is None:
        return None
    return {
        "place": "disk" if job.streams_on_disk(windows.tokens) else "memory",
        "held": max(trial.held for trial in found.trials.values()),
        "bytes": job.stream_bytes(windows.tokens),
    }


def _memory(found: Rehearsal, streams: Mapping[str, Any] | None) -> int:
    each = streams["bytes"] if streams and streams["place"] == "memory" else 0
    stages = [found.outside.memory]
    stages += [trial.memory + trial.held * each for trial in found.trials.values()]
    if found.capture:
        stages.append(found.capture.memory + each)
    return max(stages)


def _sizes(job: Job, found: Rehearsal, nearest: list[tuple[Trial, float]]) -> dict[str, Any]:
    """Estimate's linears, model, bytes and learned."""
    reader, outside = job.source.reader, found.outside_tensors
    stored = _stored_by_kind(found)
    head = {
        n for disk in found.outside_record.get("modules", {}) for n in _tensors_of(disk, outside)
    }
    packed = float(sum(outside[name].bytes for name in head))
    weights = sum(math.prod(e["shape"]) for e in found.outside_record.get("modules", {}).values())
    rest = [info for name, info in outside.items() if name not in head]
    headers = found.outside_record["size"] - sum(info.bytes for info in outside.values())
    learned = 0.0
    for name, kinds, (trial, share) in zip(job.blocks, found.kinds, nearest, strict=True):
        each = [stored[kind] for kind in kinds.values()]
        packed += sum(size for size, _ in each)
        weights += weights_in(kinds)
        replaced = {f"{disk}.weight" for disk in kinds}
        kept = [reader.tensors[n] for n in job.source.block_tensors(name) if n not in replaced]
        rest += kept
        count = len(kept) + sum(count for _, count in each)
        tensors = trial.record["tensors"]
        headers += count * (trial.record["size"] - sum(tensors.values())) / len(tensors)
        learned += share * trial.learned
    whole = packed + sum(info.bytes for info in rest)
    return {
        "linears": 8 * packed / weights,
        "model": 8 * whole / (weights + sum(math.prod(info.shape) for info in rest)),
        "bytes": round(whole + headers),
        "learned": round(learned),
    }


def _stored_by_kind(found: Rehearsal) -> dict[LinearKind, tuple[float, float]]:
    """The mean bytes of a linear of each kind and the number of its tensors, without its bias."""
    seen: dict[LinearKind, list[list[int]]] = defaultdict(list)
    for index, trial in found.trials.items():
        tensors = trial.record["tensors"]
        for disk, kind in found.kinds[index].items():
            seen[kind].append([tensors[name] for name in _tensors_of(disk, tensors)])
    return {
        kind: (sum(map(sum, each)) / len(each), sum(map(len, each)) / len(each))
        for kind, each in seen.items()
    }


def _tensors_of(disk: str, names: Iterable[str]) -> list[str]:
    """Those that hold a packed weight; not its bias, nor the empty tensor that marks the folder."""
    own = [name for name in names if name.startswith(f"{disk}.")]
    return [name for name in own if name not in (f"{disk}.bias", f"{disk}.weight")]
