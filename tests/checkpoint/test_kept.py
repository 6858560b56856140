"""What a stopped run left is used only as it was left."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.checkpoint.kept import HASHES, is_kept, keep

DAMAGE: dict[str, Callable[[Path], object]] = {
    "changed": lambda folder: (folder / "inside" / "b").write_text("two"),
    "cut": lambda folder: (folder / "a").write_text("on"),
    "gone": lambda folder: (folder / "a").unlink(),
    "no hashes": lambda folder: (folder / HASHES).unlink(),
    "empty hashes": lambda folder: (folder / HASHES).write_text("{}"),
    "a list": lambda folder: (folder / HASHES).write_text("[1]"),
    "not json": lambda folder: (folder / HASHES).write_text("{"),
    "outside": lambda folder: (folder / HASHES).write_text('{"../a": {"size": 3, "sha256": ""}}'),
    "no facts": lambda folder: (folder / HASHES).write_text('{"a": null}'),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    (tmp_path / "a").write_text("one")
    (tmp_path / "inside" / "b").write_text("one")
    keep(tmp_path)
    return tmp_path


def test_unchanged(folder: Path) -> None:
    assert is_kept(folder)
    keep(folder)  # a second time, over the first hashes
    assert is_kept(folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged(damage: str, folder: Path) -> None:
    DAMAGE[damage](folder)
    assert not is_kept(folder)


def test_no_folder(tmp_path: Path) -> None:
    assert not is_kept(tmp_path / "none")
