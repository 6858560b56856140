"""Measures a model, and llama.cpp beside it, in turns, so that both meet the same load."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from lowbit.bench import linears
from lowbit.bench.copying import copy_bandwidth
from lowbit.kernels.native import why_not
from lowbit.kernels.native.bandwidth import read_bandwidth
from lowbit.models.generation import greedily

PROMPT = [1]  # generation starts with one token, as llama.cpp's does
PASSES = 8  # of each side in a turn


class Peer(Protocol):
    """Another program that runs a model of the same shape."""

    def seconds(self, tokens: int, threads: int, together: int = 1) -> list[float]:
        """Returns the seconds of some passes, with so many threads and tokens in a pass."""


@dataclass
class Times:
    """Seconds of equal passes. The best counts: other processes only make passes longer."""

    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)

    def to_json(self) -> dict[str, float]:
        """Returns milliseconds: the best, that of the fastest tenth, and the median."""
        ordered = sorted(self.seconds)
        tenth, median = ordered[len(ordered) // 10], statistics.median(ordered)
        return {"best": 1e3 * ordered[0], "tenth": 1e3 * tenth, "median": 1e3 * median}


@dataclass(frozen=True)
class Speed:
    """What was measured of a model.

    threads: threads that computed.
    tokens: tokens of a pass.
    backends: names of the backends that multiplied.
    stored: bytes that store the weights of the linears which a token reads.
    weights: their number.
    bandwidth: bytes that this machine reads per second, over as many bytes; on a GPU those that a
        copy reads and writes; None: not measured.
    linears: times of the linears, the output layer included.
    generation: times of one more token of generation; None: not measured.
    peer: times of the peer's whole pass; None: there is no peer.
    """

    threads: int
    tokens: int
    backends: list[str]
    stored: int
    weights: int
    bandwidth: float | None
    linears: Times
    generation: Times | None
    peer: Times | None

    @property
    def read(self) -> float:
        """Bytes of stored weights per second."""
        return self.stored / self.linears.best

    @property
    def share(self) -> float | None:
        """Share of the bandwidth."""
        return None if self.bandwidth is None else self.read / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "threads": self.threads,
            "tokens": self.tokens,
            "backends": self.backends,
            "stored_bytes": self.stored,
            "bytes_per_second": self.read,
            "bandwidth": self.bandwidth,
            "share_of_bandwidth": self.share,
            "operations_per_second": 2 * self.tokens * self.weights / self.linears.best,
            "linears_ms": self.linears.to_json(),
        }
        if self.generation is not None:
            found["generation_ms"] = self.generation.to_json()
            found["generation_tokens_per_second"] = 1 / self.generation.best
        if self.peer is not None:
            found["peer_ms"] = self.peer.to_json()
            found["peer_over_linears"] = self.peer.best / self.linears.best
            if self.generation is not None:
                found["peer_over_generation"] = self.peer.best / self.generation.best
        return found


def measure(
    model: nn.Module,
    *,
    threads: int,
    tokens: int = 1,
    rounds: int = 4,
    peer: Peer | None = None,
    generate: bool = True,
) -> Speed:
    """Measures a model on the device where it is.

    threads: threads of torch, and of the peer.
    tokens: tokens of a pass.
    rounds: turns of each side.
    peer: a model of another program; None: there is none.
    generate: whether generation is measured too, which always makes one token at a time; it is left
        out for other passes.
    """
    with _threads(threads):
        steps = linears.record(model)
        dtype, stored = steps[0].x.dtype, linears.stored_bytes(steps)
        passes = PASSES if tokens == 1 else 1
        linears.seconds(steps, tokens, 1)  # repacks, and warms up
        whole = Times() if generate and tokens == 1 else None
        ours, theirs = Times(), None if peer is None else Times()
        bandwidth = 0.0
        for _ in range(rounds):
            ours.seconds += linears.seconds(steps, tokens, passes)
            if whole is not None:
                whole.seconds += token_seconds(model, passes)
            if peer is not None and theirs is not None:
                theirs.seconds += peer.seconds(passes, threads, tokens)
            bandwidth = max(bandwidth, _bandwidth(steps[0].x.device, stored, threads))
        return Speed(
            threads=threads,
            tokens=tokens,
            backends=linears.backends(steps, tokens, dtype),
            stored=stored,
            weights=linears.weights(steps),
            bandwidth=bandwidth or None,
            linears=ours,
            generation=whole,
            peer=theirs,
        )


def _bandwidth(device: torch.device, size: int, threads: int) -> float:
    """Returns the bytes that are read per second, or copied on a GPU; 0: it is not measured."""
    if device.type != "cpu":
        return copy_bandwidth(device, size)
    return read_bandwidth(size, threads, rounds=1) if why_not() is None else 0.0


def token_seconds(model: nn.Module, tokens: int, prompt: list[int] | None = None) -> list[float]:
    """Returns the seconds of each of some tokens of greedy generation, after the first.

    prompt: token ids to continue; None: one token.
    """
    times, generated = [], greedily(model, prompt or PROMPT, tokens + 1)
    next(generated)
    for _ in range(tokens):
        started = time.perf_counter()
        next(generated)
        times.append(time.perf_counter() - started)
    return times


def prompt_seconds(model: nn.Module, tokens: int) -> list[float]:
    """Returns the seconds of one forward pass over a prompt, in which only the last token counts.

    tokens: of the prompt.
    """
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad():
        started = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return [time.perf_counter() - started]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
