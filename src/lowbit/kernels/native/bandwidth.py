"""Measures how fast this machine reads memory, the bound of every product with one token."""

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from lowbit.kernels.native.library import functions

WORDS = 64  # the library reads so many words of 8 bytes at a time
PLACES = (1, 8)  # that it reads side by side; which is faster depends on the processor


def read_bandwidth(size: int, threads: int, rounds: int = 4) -> float:
    """Returns the bytes that are read per second, in the best of some rounds.

    size: bytes to read; as many as the weights whose products are to be compared.
    threads: threads that read at the same time.

    Raises ValueError if the kernels were not compiled.
    """
    read, run = functions().lowbit_read, size // (8 * WORDS * threads) * WORDS
    memory = torch.zeros(run * threads, dtype=torch.int64)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for places in PLACES * rounds:
            started = time.perf_counter()
            parts = [ctypes.c_void_p(memory[i * run :].data_ptr()) for i in range(threads)]
            list(pool.map(lambda part, at=places: read(part, ctypes.c_int64(run), at), parts))
            best = min(best, time.perf_counter() - started)
    return 8 * run * threads / best
