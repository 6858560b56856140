"""A quantized folder is read layer by layer and shard by shard, without a model."""

import shutil
from pathlib import Path

import pytest
import quantized
import torch
from torch import Tensor

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.formats.base import QuantizedLinear

LINEAR = "model.layers.1.mlp.up_proj"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1"
FOLDERS = [("llama", "rtn"), ("opt", "omniquant"), ("mixtral", "rtn"), ("llama", "quip")]


@pytest.mark.parametrize(("name", "method"), FOLDERS)
def test_layers_are_those_of_the_loaded_model(name: str, method: str) -> None:
    folder = QuantizedFolder(quantized.folder(name, method))
    model, _ = lowbit.load(folder.folder)
    loaded = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert {layer.stored_as for layer in loaded} == set(folder.entries)
    for wanted in loaded:
        layer = folder.layer(str(wanted.stored_as))
        assert layer.stored_as == wanted.stored_as and layer.entry() == wanted.entry()
        assert torch.equal(layer.dequantize(), wanted.dequantize())


def test_names_are_those_on_disk() -> None:
    assert QuantizedFolder(quantized.folder("mixtral")).layer(EXPERT).stored_as == EXPERT
    folder = QuantizedFolder(quantized.folder())
    near = LINEAR.replace("up_proj", "up_prj")
    for read in (folder.layer, folder.float_dtype):
        with pytest.raises(
            ValueError, match=f"no quantized layer '{near}'; did you mean '{LINEAR}'"
        ):
            read(near)


def test_a_layer_is_checked_as_it_is_read(tmp_path: Path) -> None:
    path = Path(shutil.copytree(quantized.folder(), tmp_path / "out"))
    shard = quantized.shard_with(path, f"{LINEAR}.packed")
    quantized.edit_shard(shard, lambda t: t.update({f"{LINEAR}.scale": torch.ones(80, 4)}))
    folder = QuantizedFolder(path)
    message = rf"{path}: tensor {LINEAR}.scale is torch.float32 \[80, 4\], but config.json asks"
    for read in (lambda: folder.layer(LINEAR), folder.shards):
        with pytest.raises(ValueError, match=message):
            read()
    assert folder.layer("model.layers.0.mlp.up_proj").out_features == 80


@pytest.mark.parametrize(("name", "method"), FOLDERS)
def test_every_tensor_is_in_one_place(name: str, method: str) -> None:
    folder = QuantizedFolder(quantized.folder(name, method))
    shards = folder.shards()
    assert [shard.file for shard in shards] == folder.reader.files
    layers = [layer for shard in shards for layer in shard.layers]
    others = [tensor for shard in shards for tensor in shard.others]
    assert sorted(layers) == sorted(folder.entries)
    packed = [tensor for layer in layers for tensor in folder.tensors_of(layer)]
    assert sorted([*packed, *others, folder.placeholder]) == sorted(folder.reader.tensors)
    placed = folder.reader.tensors
    for shard in shards:
        assert all(placed[tensor].file == shard.file for tensor in shard.others)
        for layer in shard.layers:
            assert {placed[tensor].file for tensor in folder.tensors_of(layer)} == {shard.file}


def test_shards_are_converted_one_at_a_time() -> None:
    folder = QuantizedFolder(quantized.folder())
    steps: list[tuple[int, int]] = []

    def shape(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
        assert layer.stored_as == name
        return {"shape": torch.tensor(layer.spec.shape)}

    found: dict[str, Tensor] = {}
    for done, shard in enumerate(folder.converted_shards(shape, lambda *step: steps.append(step))):
        assert steps[-1] == (done, 3)
        found |= shard
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert {n for n in found if n.endswith(".shape")} == {f"{n}.shape" for n in folder.entries}
    assert found[f"{LINEAR}.shape"].tolist() == [80, 48]
    kept = {n: t for n, t in found.items() if not n.endswith(".shape")}
    assert set(kept) == {tensor for shard in folder.shards() for tensor in shard.others}
    wanted = folder.reader.read(kept)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in kept.items())


def test_the_dtype_of_the_float_weight() -> None:
    """The entry states the dtype; in a folder of version 1 it is that of the placeholder."""
    folder = QuantizedFolder(quantized.folder("opt", "omniquant", torch.bfloat16))
    name = next(iter(folder.entries))
    folder.entries = {name: {k: v for k, v in folder.entries[name].items() if k != "dtype"}}
    assert folder.float_dtype(name) == torch.bfloat16
    folder.entries[name]["dtype"] = "float16"
    assert folder.float_dtype(name) == torch.float16
