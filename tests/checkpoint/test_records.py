"""A record counts only if it is whole, of this run, and its shard is what was written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.checkpoint import CheckpointWriter
from lowbit.checkpoint.records import digest_of, read_record, sealed

FILE = "model-00001-of-00001.safetensors"
SIGNATURE = {"seed": 0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    data = {"report": {"slices_db": {8: 1.5, 10: 2.5}}, "modules": {"a": {"shape": (1, 2)}}}
    with CheckpointWriter(tmp_path, SIGNATURE, 1) as out:
        out.write_shard(0, {"a": torch.ones(2)}, {"b": torch.ones(1)}, data)
    return tmp_path / "run" / FILE.replace("safetensors", "json")


def read(path: Path) -> dict[str, Any]:
    return read_record(path, FILE, digest_of(SIGNATURE))


def test_as_it_was_written(path: Path) -> None:
    record = read(path)
    assert record["tensors"] == {"a": 8}
    assert record["report"] == {"slices_db": {"8": 1.5, "10": 2.5}}
    assert record["modules"] == {"a": {"shape": [1, 2]}}
    with CheckpointWriter(path.parent.parent, SIGNATURE, 1) as out:
        assert out.record(0) == record and not out.damaged


VALUES: tuple[Any, ...] = (None, [], {}, "x", -1, True, "../outside/shard.safetensors")
WHOLE = {"a list": [], "nothing": None, "an empty object": {}, "a number": 7, "a text": "x"}


@pytest.mark.parametrize("name", WHOLE)
def test_other_values(name: str, path: Path) -> None:
    path.write_text(json.dumps(WHOLE[name]))
    with pytest.raises(ValueError, match=f"^run/{path.name} "):
        read(path)


def test_not_json(path: Path) -> None:
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=f"^run/{path.name} cannot be read as JSON"):
        read(path)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize(
    "field", ["file", "size", "sha256", "tensors", "learned", "run", "digest", "modules", "report"]
)
def test_every_field(field: str, forged: bool, path: Path) -> None:
    content = json.loads(path.read_text())
    absent = {k: v for k, v in content.items() if k != field}
    for edited in [absent, *({**content, field: value} for value in VALUES)]:
        if forged:
            edited = sealed({k: v for k, v in edited.items() if k != "digest"})
        path.write_text(json.dumps(edited))
        try:
            found = read(path)
        except ValueError as error:
            assert str(error).startswith((f"run/{path.name} ", f"{FILE} "))
            continue
        edited.pop(field, None)
        assert forged and edited.items() <= found.items()


def test_of_another_run_or_shard(path: Path) -> None:
    for file, run in ((FILE, "x"), ("model-00002-of-00002.safetensors", digest_of(SIGNATURE))):
        with pytest.raises(ValueError, match="belongs to another run or shard"):
            read_record(path, file, run)


def test_learned_parameters_belong_to_it(path: Path) -> None:
    learned = path.parent.parent / "learned" / FILE
    learned.write_bytes(learned.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"^learned/{FILE} is damaged"):
        read(path)
