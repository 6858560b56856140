"""A folder without a tokenizer, and one whose tokenizer cannot be read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import zoo

from lowbit.models.tokenizer import load_tokenizer, need_tokenizer

FILE = "tokenizer.json"


@pytest.mark.parametrize("damage", [None, {}, {"model": {"type": "Foo"}}, {"pre_tokenizer": 1}])
def test_a_damaged_tokenizer(damage: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(
        zoo.MODELS / "llama-mini", folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    whole = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text("" if damage is None else json.dumps(damage and whole | damage))
    with pytest.raises(
        ValueError, match="model has a tokenizer that cannot be loaded: ."
    ) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        shutil.copy(zoo.MODELS / "llama-mini" / name, tmp_path)
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(ValueError, match=r"has no tokenizer: copy the tokenizer files .* into it"):
        need_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "spiece.model", "x.tiktoken"])
def test_a_file_of_a_tokenizer_must_be_readable(name: str, tmp_path: Path) -> None:
    shutil.copy(zoo.MODELS / "llama-mini" / "config.json", tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match="has a tokenizer that cannot be loaded: ."):
        load_tokenizer(tmp_path)


def test_a_tokenizer() -> None:
    for load in (load_tokenizer, need_tokenizer):
        assert load(zoo.MODELS / "llama-mini")("Once")["input_ids"]
