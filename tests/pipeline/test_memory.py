"""Peak memory counts memory that was freed again, but no mapped files."""

import gc
import mmap
import time
from pathlib import Path

import pytest
import torch

from lowbit.pipeline import memory
from lowbit.pipeline.memory import EVERY, PeakMemory, memory_now

MEGABYTE = 1 << 20
CPU = torch.device("cpu")


def peak(size: int) -> int:
    with PeakMemory(CPU) as measured:
        held = torch.ones(size, dtype=torch.uint8)
        time.sleep(4 * EVERY)
        del held
    return measured.bytes["memory"]


def test_what_was_freed_again_counts() -> None:
    gc.collect()  # what other tests left may otherwise go in the meantime
    before = memory_now()
    assert 200 * MEGABYTE < peak(256 * MEGABYTE) - before < 300 * MEGABYTE
    assert memory_now() - before < 64 * MEGABYTE


@pytest.mark.skipif(not memory.STATUS.exists(), reason="only Linux tells")
def test_mapped_files_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(64 * MEGABYTE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = memory_now()
        assert mapped[:: mmap.PAGESIZE].count(b"\0") > 0
        assert memory_now() - before < 16 * MEGABYTE


def test_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anonymous = memory_now()
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    assert memory_now() > anonymous  # with libraries and the highest so far
    assert peak(MEGABYTE) >= anonymous


def test_a_gpu_counts_from_here_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name, answer in (("reset_peak_memory_stats", None), ("max_memory_allocated", 7)):

        def tell(device: torch.device, name: str = name, answer: int | None = answer) -> int | None:
            asked.append(f"{name} {device}")
            return answer

        monkeypatch.setattr(torch.cuda, name, tell)
    with PeakMemory(torch.device("cuda:1")) as measured:
        assert asked == ["reset_peak_memory_stats cuda:1"]
    assert asked[1:] == ["max_memory_allocated cuda:1"] and measured.bytes["device_memory"] == 7
    with PeakMemory(CPU) as measured:
        pass
    assert measured.bytes.keys() == {"memory"}
