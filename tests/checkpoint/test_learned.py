from pathlib import Path

import pytest
import torch

from lowbit.checkpoint.learned import Learned
from lowbit.checkpoint.writer import save_tensors

BLOCKS = [{"low": torch.ones(2)}, {}]


def learned(folder: Path, value: float = 1.0) -> Path:
    (folder / "learned").mkdir(parents=True)
    for i, tensors in enumerate(BLOCKS):
        name = f"model-0000{i + 2}-of-00003.safetensors"
        scaled = {key: value * tensor for key, tensor in tensors.items()}
        save_tensors(folder / "learned" / name, scaled)
    return folder


@pytest.mark.parametrize("inside", ["", "learned"])
def test_every_block_gets_its_own(tmp_path: Path, inside: str) -> None:
    found = Learned(learned(tmp_path / "out") / inside, 3)
    assert torch.equal(found.of(1)["low"], BLOCKS[0]["low"]) and found.of(2) == {}


def test_the_digest_is_of_the_values(tmp_path: Path) -> None:
    one, same, other = (
        Learned(learned(tmp_path / name, value), 3).digest()
        for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0))
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("shards", "gone", "message"),
    [
        (3, "model-00003-of-00003.safetensors", "lacks model-00003-of-00003.*it has 1 such files"),
        (4, None, "lacks model-00002-of-00004.*it has 2 such files, this model needs 3"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, shards: int, gone: str | None, message: str
) -> None:
    out = learned(tmp_path / "out")
    if gone:
        (out / "learned" / gone).unlink()
    with pytest.raises(ValueError, match=message):
        Learned(out, shards)


def test_a_folder_without_any(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has 0 such files, this model needs 2.*that learns"):
        Learned(tmp_path, 3)


NONE = {
    "nothing": (lambda path: None, "does not exist"),
    "a file": (lambda path: path.write_text("x"), "is a file"),
    "a model": (
        lambda path: ((learned(path) / "config.json").write_text("{}"), shift(path)),
        "has no folder learned, it is a model that learned nothing",
    ),
}


def shift(out: Path) -> None:
    """Moves the files to where the shards of a model are."""
    for file in (out / "learned").iterdir():
        file.rename(out / file.name)
    (out / "learned").rmdir()


@pytest.mark.parametrize("name", NONE)
def test_what_has_no_learned_parameters(name: str, tmp_path: Path) -> None:
    make, says = NONE[name]
    make(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"out {says}.*: name the OUT of a finished run"):
        Learned(tmp_path / "out", 3)
