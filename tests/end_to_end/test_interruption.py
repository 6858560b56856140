"""A run can die at any moment, and the same call continues it to the same bytes."""

import errno
import os
from pathlib import Path
from shutil import rmtree

import pytest
import quantized
from killing import Disk, Killed, watched

import lowbit

pytestmark = pytest.mark.slow

UNFINISHED = "unfinished|no such folder|is missing|is empty|has no weights"

# Imports once, then starts the same run again and again in processes that are killed, each a little
# later than the one before, until one is done. Prints how many it took.
KILL = """
import os, random, signal, sys, time
from pathlib import Path
import quantized
from lowbit import Calibration
model, out = map(Path, sys.argv[1:3])
texts = Calibration.model_validate_json(sys.argv[3])
draw, killed = random.Random(0), 0
while True:
    child = os.fork()
    if child == 0:
        quantized.quantize(model, out, "omniquant", calibration=texts)
        os._exit(0)
    time.sleep(draw.uniform(0.04, 0.08) * 1.2**killed)
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
    killed += 1
print(killed)
"""


def same(out: Path, wanted: dict[str, bytes], when: str) -> None:
    found = quantized.contents(out)
    assert found.keys() == wanted.keys(), when
    assert not [name for name in found if name.endswith(".part")], when
    assert not [name for name in wanted if found[name] != wanted[name]], when


# One that learns, one whose layers share, one without text; the disk sees no more of the others.
@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["rtn", "omniquant", "quip"])
def test_killed_between_any_two_changes_to_the_disk(method: str, tmp_path: Path) -> None:
    model, whole = quantized.source(), quantized.contents(quantized.folder(method=method))
    with watched(Disk(tmp_path / "counted")) as disk:
        quantized.quantize(model, tmp_path / "counted", method)
    same(tmp_path / "counted", whole, "not killed")
    assert disk.count > 35
    for last in range(disk.count):
        out = tmp_path / f"{last}"
        with pytest.raises(Killed), watched(Disk(out, last)):
            quantized.quantize(model, out, method)
        if not (out / "config.json").exists():
            with pytest.raises(ValueError, match=UNFINISHED):
                lowbit.load(out)
        quantized.quantize(model, out, method)
        same(out, whole, f"killed after {last} changes")
        rmtree(out)


@pytest.mark.parametrize("last", range(1, 40, 4))
def test_a_full_disk_is_reported_and_finished_blocks_are_kept(last: int, tmp_path: Path) -> None:
    out, full = tmp_path / "out", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(ValueError, match=f"the disk that holds {out} is full.*same command"),
        watched(Disk(out, last, full)),
    ):
        quantized.quantize(quantized.source(), out)
    finished = quantized.contents(out)
    quantized.quantize(quantized.source(), out)
    found = quantized.contents(out)
    same(out, quantized.contents(quantized.folder()), f"full after {last} changes")
    kept = {name for name in finished if not name.endswith(".part")}
    assert all(found[name] == finished[name] for name in kept)


@pytest.mark.exhaustive
def test_killed_for_real(tmp_path: Path) -> None:
    texts = quantized.calibration().model_dump_json()
    done = quantized.python(KILL, quantized.source(), tmp_path / "out", texts)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    same(tmp_path / "out", quantized.contents(quantized.folder(method="omniquant")), "SIGKILL")
