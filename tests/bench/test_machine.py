"""What lowbit says about the machine."""

from pathlib import Path

import pytest

from lowbit.bench import machine
from lowbit.bench.machine import Machine
from lowbit.kernels.native.library import VARIABLE, available

REASONS = {
    "off": ("off", "LOWBIT_KERNELS is off; torch computes everything"),
    "wrong": (
        "sse",
        "LOWBIT_KERNELS is 'sse': allowed are off, portable, avx2, avx512, neon, vbmi, amx",
    ),
}


@pytest.mark.kernels
@pytest.mark.parametrize(("value", "reason"), REASONS.values(), ids=REASONS)
def test_why_there_are_no_kernels(value: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.chosen.cache_clear()
    monkeypatch.setenv(VARIABLE, value)
    found = Machine.here()
    machine.chosen.cache_clear()
    assert found.kernels is None and found.why_not is not None
    assert found.why_not == reason or not available()


@pytest.mark.kernels
@pytest.mark.skipif(not available(), reason="needs a compiler: the kernels were not compiled")
def test_kernels_are_found() -> None:
    found = Machine.here()
    assert found.kernels in found.instruction_sets == list(available())
    assert found.why_not is None and found.library is not None


def test_the_library_is_named_without_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path("/home/someone")
    monkeypatch.setattr(Path, "home", lambda: home)
    for file, shown in ((home / "lib" / "k.so", "~/lib/k.so"), (Path("/opt/k.so"), "k.so")):
        monkeypatch.setattr(machine, "path", lambda file=file: file)
        assert Machine.here().library == shown


def test_extras_without_metadata_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2", "pip; extra == 'a'", 'no-such-package>=1; extra == "b"']
    needed += ["pytest; extra == 'dev'"]
    monkeypatch.setattr(machine, "requires", lambda name: needed)
    assert Machine.here().extras == {"a": {"pip": machine.version("pip")}} | {
        "b": {"no-such-package": None}
    }
