"""Folders of which config.json alone is there, and what stands for them."""

import json
from pathlib import Path

import pytest
import torch
from zoo import MODELS

from lowbit.checkpoint.reader import CheckpointReader
from lowbit.models.shapes_only import has_weights, is_shapes_only, planned_folder

MINI = MODELS / "llama-mini"

# The files of a folder, and whether a run can read weights there (or says why it cannot).
FOLDERS = {
    "config alone": (["config.json"], False),
    "with a tokenizer": (["config.json", "tokenizer.json", "README.md"], False),
    "one file": (["config.json", "model.safetensors"], True),
    "shards": (["config.json", "model.safetensors.index.json", "a.safetensors"], True),
    "an index without shards": (["config.json", "model.safetensors.index.json"], False),
    "another layout": (["config.json", "pytorch_model.bin"], True),
    "no config": (["tokenizer.json"], True),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_which_folders_have_weights(name: str, tmp_path: Path) -> None:
    files, wanted = FOLDERS[name]
    for file in files:
        index = {"weight_map": {"a": "a.safetensors"}}
        (tmp_path / file).write_text(json.dumps(index) if file.endswith("index.json") else "{}")
    assert has_weights(tmp_path) == wanted


def test_shapes_are_those_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((MINI / "config.json").read_bytes())
    wanted = CheckpointReader(MINI).tensors
    with planned_folder(tmp_path) as (folder, alone):
        assert alone and is_shapes_only(folder) and not is_shapes_only(tmp_path)
        with planned_folder(folder) as (same, still):
            assert same == folder and still
        reader = CheckpointReader(folder)
        assert {n: i.shape for n, i in reader.tensors.items()} == {
            n: i.shape for n, i in wanted.items()
        }
        (first,) = reader.read([next(iter(wanted))]).values()
        assert not torch.any(first)
    assert not folder.exists()


def test_weights_are_left_out_on_request() -> None:
    with planned_folder(MINI) as (folder, alone):
        assert folder == MINI and not alone
    with planned_folder(MINI, without_weights=True) as (folder, alone):
        assert folder != MINI and alone


@pytest.mark.parametrize("changed", [{"num_attention_heads": 5}, {"hidden_act": "zap"}])
def test_errors_name_the_folder_that_was_given(changed: dict, tmp_path: Path) -> None:
    stated = json.loads((MINI / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | changed | {"head_dim": None}))
    with pytest.raises(ValueError) as caught, planned_folder(tmp_path):
        pass
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "lowbit-shapes-" not in str(caught.value)
