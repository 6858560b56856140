"""Hashes of shards: those of the files, kept only while the files are the same."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import kept_hashes
from lowbit.checkpoint.kept_hashes import sha256_of_files
from lowbit.checkpoint.reader import file_sha256

NAMES = [f"{i}.safetensors" for i in range(6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files that were changed a while ago."""
    for i, name in enumerate(NAMES):
        save_file({"x": torch.full((3,), float(i))}, tmp_path / name)
        os.utime(tmp_path / name, (1e9, 1e9))
    return tmp_path


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are hashed from now on."""
    names: list[str] = []
    whole = kept_hashes.checked_sha256

    def noted(path: Path, *arguments):
        names.append(path.name)
        return whole(path, *arguments)

    monkeypatch.setattr(kept_hashes, "checked_sha256", noted)
    return names


def test_each_file_has_its_own_hash(folder: Path) -> None:
    found = sha256_of_files(folder, NAMES, None, None)
    assert found == {name: file_sha256(folder / name) for name in NAMES}


def test_a_file_is_hashed_again_only_if_it_has_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, names = tmp_path / "cache", hashed(monkeypatch)
    first = sha256_of_files(folder, NAMES, None, cache)
    assert sorted(names) == NAMES
    assert sha256_of_files(folder, NAMES, None, cache) == first
    assert len(names) == len(NAMES)
    save_file({"x": torch.full((3,), 9.0)}, folder / NAMES[2])  # the same size
    os.utime(folder / NAMES[2], (1e9 + 1, 1e9 + 1))
    second = sha256_of_files(folder, NAMES, None, cache)
    assert names[len(NAMES) :] == [NAMES[2]]
    assert second[NAMES[2]] == file_sha256(folder / NAMES[2]) != first[NAMES[2]]


def test_what_was_not_checked_is_not_taken_for_checked(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    save_file({"x": torch.tensor([torch.nan])}, folder / NAMES[4])
    os.utime(folder / NAMES[4], (1e9, 1e9))
    sha256_of_files(folder, NAMES, set(), cache)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"{NAMES[4]}: tensor x has values that are not finite"
        ):
            sha256_of_files(folder, NAMES, {"x"}, cache)


def test_damaged_entries_and_young_files_are_hashed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    os.utime(folder / NAMES[0])
    wanted = sha256_of_files(folder, NAMES, None, cache)
    kept = sorted(cache.iterdir())
    assert len(kept) == len(NAMES) - 1
    kept[0].write_text("{")
    kept[1].write_text(json.dumps({"sha256": 3}))
    names = hashed(monkeypatch)
    assert sha256_of_files(folder, NAMES, None, cache) == wanted
    assert len(names) == 3
