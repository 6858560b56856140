"""Values that are not finite are found in the pass that hashes a file, wherever they stand."""

import shutil
from pathlib import Path

import pytest
import quantized
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import file_sha256
from lowbit.checkpoint.finite import CHUNK, checked_sha256, is_finite
from lowbit.methods import RTN

PLACES = {
    "embedding": "model.embed_tokens.weight",
    "linear": "model.layers.1.mlp.down_proj.weight",
    "norm": "model.layers.0.input_layernorm.weight",
    "last norm": "model.norm.weight",
    "head": "lm_head.weight",
}
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def damaged(folder: Path, tensor: str, value: float, source: Path | None = None) -> Path:
    shutil.copytree(source or quantized.source(), folder)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor] = tensors[tensor].clone()
        tensors[tensor].view(-1)[-1] = value

    quantized.edit_shard(folder / "model.safetensors", edit)
    return folder


@pytest.mark.parametrize("tensor", PLACES.values(), ids=list(PLACES))
def test_a_run_does_not_start(tensor: str, tmp_path: Path) -> None:
    model = damaged(tmp_path / "model", tensor, BAD["nan"])
    with pytest.raises(ValueError, match=f"model.safetensors: tensor {tensor} has values that are"):
        quantized.quantize(model, tmp_path / "out", "rtn")
    assert not (tmp_path / "out").exists()


def test_a_bias_is_checked_too(tmp_path: Path) -> None:
    bias = "model.decoder.layers.0.fc1.bias"
    model = damaged(tmp_path / "model", bias, BAD["inf"], quantized.source("opt"))
    with pytest.raises(ValueError, match=f"tensor {bias} has values that are not finite"):
        quantized.quantize(model, tmp_path / "out", RTN(bits=4, group_size=16))


@pytest.mark.parametrize("value", BAD.values(), ids=list(BAD))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", [0, 7, -1])
def test_every_value_is_seen(value: float, dtype: torch.dtype, index: int, tmp_path: Path) -> None:
    bad = torch.ones(1001, dtype=dtype)
    bad[index] = value
    assert not is_finite(bad)
    save_file({"a": torch.ones(3, dtype=torch.uint8), "bad": bad}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors: tensor bad has values that are not fin"):
        checked_sha256(tmp_path / "a.safetensors")


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    large = torch.zeros(CHUNK // 4 + 3)  # more than one chunk
    tensors = {"bytes": torch.full((5,), 255, dtype=torch.uint8), "large": large}
    tensors |= {"empty": torch.empty(0), "half": torch.ones(3, dtype=torch.float16)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    assert checked_sha256(path) == file_sha256(path)
    large[-1] = BAD["nan"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="tensor large has"):
        checked_sha256(path)


@pytest.mark.parametrize("method", ["rtn", "gptq", "quip", "omniquant"])
def test_very_large_weights_name_the_linear(method: str, tmp_path: Path) -> None:
    tensor = "model.layers.1.mlp.down_proj.weight"
    model = damaged(tmp_path / "model", tensor, 1e30)
    name = tensor.removesuffix(".weight")
    with pytest.raises(ValueError, match=rf"{name} has weights up to 1e\+30: their squares over"):
        quantized.quantize(model, tmp_path / "out", method)


def test_tensors_that_the_model_does_not_read_may_be_infinite(tmp_path: Path) -> None:
    mask = "model.layers.0.self_attn.bias"
    model = shutil.copytree(quantized.source(), tmp_path / "model")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[mask] = torch.full((3, 3), BAD["-inf"])

    quantized.edit_shard(model / "model.safetensors", add)
    assert checked_sha256(model / "model.safetensors", {"lm_head.weight"}) == file_sha256(
        model / "model.safetensors"
    )
    quantized.quantize(model, tmp_path / "out", "rtn")
