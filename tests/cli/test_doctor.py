"""lowbit doctor."""

import json
from pathlib import Path

import pytest

from lowbit.bench.machine import Machine


def test_one_screen_and_a_file(lowbit, tmp_path):
    file = tmp_path / "found.json"
    text = lowbit("doctor", "--json", file).stdout
    assert len(text.splitlines()) <= 24
    assert json.loads(file.read_text()) | {"load": 0} == Machine.here().to_json() | {"load": 0}
    for fact in ("processor", "kernels", "threads", "torch", "transformers", "GPU"):
        assert f"\n{fact} " in text
    assert "LOWBIT_KERNELS is off; torch computes everything" in text
    assert str(Path.home()) not in text + file.read_text()


def test_an_extra_that_is_not_installed(lowbit, monkeypatch: pytest.MonkeyPatch):
    requirements = ["no-such-package>=1; extra == 'serve'"]
    monkeypatch.setattr("lowbit.bench.machine.requires", lambda name: requirements)
    line = "extra serve   no-such-package not installed: pip install 'lowbit[serve]'"
    assert line in lowbit("doctor").stdout
