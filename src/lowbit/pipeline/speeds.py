"""Measures how fast this machine is: what a count of `lowbit.pipeline.meters` takes in seconds."""

import time
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

from lowbit.device import synchronize
from lowbit.kernels.products import product
from lowbit.pipeline.meters import CUBES, KINDS, LAUNCHES, OPERATIONS, VALUES, WHOLE_VALUES

CALLS = 2000  # of torch, on a few numbers
CACHED = 2**16  # values that stay in the second-level cache
LARGE = 3 * 2**22  # values of 48 MiB: a temporary tensor of this size is mapped anew each time
WIDTH, TOKENS = 2048, 512  # of the product
FACTORED = 1536  # n of the matrix that is factored
TRIES = 3  # of which the fastest counts, since the process may have waited for the machine


def speeds(device: torch.device) -> numpy.ndarray:
    """Returns the seconds of one of each kind of count; takes about a second on a CPU."""
    found = numpy.zeros(KINDS)
    few, cached = torch.ones(16, device=device), torch.rand(CACHED, device=device)
    found[LAUNCHES] = _seconds(lambda: [few.add(1.0) for _ in range(CALLS)], device) / CALLS
    large = torch.rand(LARGE, device=device)
    found[VALUES] = _elementwise(cached, 100, device)
    found[WHOLE_VALUES] = _elementwise(large, 1, device)
    a, b = torch.rand(TOKENS, WIDTH, device=device), torch.rand(WIDTH, WIDTH, device=device)
    found[OPERATIONS] = _seconds(lambda: product(a, b), device) / (2 * TOKENS * WIDTH**2)
    matrix = b[:FACTORED, :FACTORED]
    matrix = matrix @ matrix.T + FACTORED * torch.eye(FACTORED, device=device)
    found[CUBES] = _seconds(lambda: torch.linalg.cholesky_ex(matrix), device) / FACTORED**3
    return found


def _elementwise(values: Tensor, times: int, device: torch.device) -> float:
    """Returns the seconds of one operation on one value, a mean over those that rounding takes."""

    def work() -> None:
        for _ in range(times):
            scaled = values / 0.37
            rounded = scaled.round()
            kept = rounded.clamp(0, 15)
            kept.sub(3.0).mul(values)

    return _seconds(work, device) / (5 * times * values.numel())


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of the fastest of some calls."""
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
