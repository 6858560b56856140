"""Measures peak memory while some code runs; see `PeakMemory`."""

import re
import resource
import sys
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

import torch

from lowbit.device import peak_memory, reset_peak

STATUS = Path("/proc/self/status")
EVERY = 0.05  # seconds between two samples; one sample takes 50 microseconds


class PeakMemory:
    """A context manager that measures peak memory; `bytes` is complete when it exits.

    bytes["memory"]: bytes of the process, without memory-mapped files such as shards, whose pages
        the system can take back. On systems without /proc it is the peak since the process started,
        mapped files included.
    bytes["device_memory"]: bytes that torch allocated on `device`; only if that has its own
        memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: dict[str, int] = {}
        self._done = Event()
        self._sampler = Thread(target=self._sample_until_done, daemon=True)
        self._highest = 0

    def __enter__(self) -> Self:
        reset_peak(self.device)
        self._sample()
        self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._sampler.join()
        self._sample()
        self.bytes["memory"] = self._highest
        on_device = peak_memory(self.device)
        if on_device is not None:
            self.bytes["device_memory"] = on_device

    def _sample_until_done(self) -> None:
        while not self._done.wait(EVERY):
            self._sample()

    def _sample(self) -> None:
        self._highest = max(self._highest, memory_now())


def memory_now() -> int:
    """Returns the bytes of this process without mapped files; without /proc its peak so far."""
    try:
        anonymous = re.search(r"^RssAnon:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    except OSError:
        anonymous = None
    if anonymous is not None:
        return 1024 * int(anonymous[1])
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, else in KiB
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
