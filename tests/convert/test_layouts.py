"""Layouts are chosen by name."""

from pathlib import Path

import pytest

from lowbit.convert import READERS, convert


def test_a_folder_and_its_layout_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'bim' is not a layout .*: did you mean 'bin'"):
        convert(tmp_path, tmp_path / "out", "bim")
    with pytest.raises(ValueError, match="nowhere: there is no such folder; from the hub: hf"):
        convert(tmp_path / "nowhere", tmp_path / "out", "bin")


def test_the_reader_of_that_name_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, "quip", lambda *given: Path(*map(str, given[1:])))
    assert convert(str(tmp_path), "out", "quip", True) == Path("out") / "True"
