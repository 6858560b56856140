"""How much memory a stretch of work took at its highest; see `PeakMemory`."""

import re
import resource
import sys
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

import torch

STATUS = Path("/proc/self/status")
EVERY = 0.05  # seconds between looks; one takes 50 microseconds


class PeakMemory:
    """A context manager; `found` is complete once it is left.

    memory: bytes of the process that belong to no file, at their highest while inside. A mapped
    shard does not count: the system may take its pages back. Where /proc does not tell, it is the
    most that the process ever held. device_memory: of `device`, when that is a CUDA device, as
    torch allocated it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, int] = {}
        self._left = Event()
        self._watcher = Thread(target=self._watch, daemon=True)
        self._peak = 0

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._look()
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()
        self._watcher.join()
        self._look()
        self.found["memory"] = self._peak
        if self.device.type == "cuda":
            self.found["device_memory"] = torch.cuda.max_memory_allocated(self.device)

    def _watch(self) -> None:
        while not self._left.wait(EVERY):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, memory_now())


def memory_now() -> int:
    """Bytes of this process that belong to no file, or else the most that it ever held."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, where it is not pages
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
