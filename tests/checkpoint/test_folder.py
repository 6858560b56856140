"""A folder is written completely or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.folder import write_folder


@pytest.fixture
def companions(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    weights = ("model.safetensors", "x.bin", "x.bin.index.json")
    ours = ("report.json", "report.html", "events.jsonl")
    for name in ("tokenizer.json", "LICENSE", *weights, *ours):
        (folder / name).write_text("{}")
    return folder


def test_shards_index_and_companions(companions: Path, tmp_path: Path) -> None:
    shards = [{"a": torch.ones(2)}, {"b": torch.zeros(3, dtype=torch.float16), "c": torch.ones(1)}]
    out = tmp_path / "out"
    write_folder(out, iter(shards), 2, {"model_type": "x"}, companions)
    reader = CheckpointReader(out)
    assert {name: info.file[6:11] for name, info in reader.tensors.items()} == {
        "a": "00001",
        "b": "00002",
        "c": "00002",
    }
    others = {p.name for p in out.iterdir()} - set(reader.files)
    ours = {"config.json", "model.safetensors.index.json", "README.md"}
    assert others == ours | {"tokenizer.json", "LICENSE"}


def test_an_error_half_way_leaves_nothing(companions: Path, tmp_path: Path) -> None:
    def failing() -> Iterator[dict[str, torch.Tensor]]:
        yield {"a": torch.ones(2)}
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write_folder(tmp_path / "out", failing(), 2, {}, companions)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_an_existing_folder_is_left_alone(companions: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        write_folder(companions, iter([]), 0, {}, companions)
