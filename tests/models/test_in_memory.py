"""A model in memory is saved to a temporary folder."""

from pathlib import Path

import pytest
import quantized
import torch
import zoo
from torch import nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.models.in_memory import name_of, saved_beside
from lowbit.models.source import SourceModel


def test_the_folder_is_the_model_and_goes_away(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo.folder("llama"))
    out = tmp_path / "deeper" / "out"
    with saved_beside(model, None, out) as folder:
        assert folder.parent.parent == out.parent and not out.exists()
        assert (
            SourceModel(folder).reader.tensors.keys() == zoo.source("llama").reader.tensors.keys()
        )
        block = SourceModel(folder).load_block("model.layers.0")
        wanted = model.get_submodule("model.layers.0")
        assert torch.equal(block.mlp.up_proj.weight, wanted.mlp.up_proj.weight)
    assert not list(out.parent.iterdir())


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model, tokenizer = lowbit.load(quantized.source("llama"))
    with saved_beside(model, tokenizer, tmp_path / "out") as folder:
        assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [("/home/somebody/models/tiny", "tiny"), ("owner/tiny", "tiny"), ("", "LlamaForCausalLM")],
)
def test_its_name_gives_nothing_private_away(path: str, name: str) -> None:
    model = zoo.make(zoo.ZOO["llama"])
    model.config.name_or_path = path
    assert name_of(model) == name


def test_what_is_no_whole_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is a Linear: allowed are a folder, a hub id, or a"):
        saved_beside(nn.Linear(1, 1), None, tmp_path / "out").__enter__()  # type: ignore[arg-type]
    model, _ = lowbit.load(quantized.folder("llama"))
    with pytest.raises(ValueError, match="already quantized"):
        saved_beside(model, None, tmp_path / "out").__enter__()
    with pytest.raises(ValueError, match=r"is torch.float64: allowed are float32.*model.to\("):
        saved_beside(zoo.make(zoo.ZOO["llama"]).double(), None, tmp_path / "out").__enter__()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(zoo.make(zoo.ZOO["llama"]).config)
    with pytest.raises(ValueError, match="is not in memory .*: load the model whole"):
        saved_beside(empty, None, tmp_path / "out").__enter__()
    assert not list(tmp_path.iterdir())
