"""Measures how fast a GPU copies memory, the bound of every product with one token there."""

import time

import torch

from lowbit.device import synchronize

LEAST = 2**28  # bytes; fewer stay in a cache


def copy_bandwidth(device: torch.device, size: int, least: int = LEAST) -> float:
    """Returns the bytes that a copy reads and writes per second.

    size: bytes to copy, of which at least `least` are.
    """
    source = torch.zeros(max(size, least), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize(device)
    started = time.perf_counter()
    target.copy_(source)
    synchronize(device)
    return 2 * len(source) / (time.perf_counter() - started)
