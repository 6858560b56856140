"""PTQ1.61 through the whole pipeline: shared masks on disk, sizes to the byte, replay, resuming."""

from pathlib import Path
from shutil import copytree

import pytest
import quantized
import torch

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.formats.binary import BinaryLinear, tensor_bytes
from lowbit.methods import PTQ161

pytestmark = pytest.mark.slow

METHOD = PTQ161(epochs=1, min_tokens=8, overrides={"o_proj": {"salient_ratio": 0.3}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for name in ("llama", "opt", "mixtral"):
        fields = {} if name == "llama" else {"overrides": {}}
        out = tmp_path_factory.mktemp("binary") / name
        made[name] = quantized.quantize(
            quantized.source(name), out, METHOD.model_copy(update=fields)
        )
    return made


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_loaded_and_run(folders: dict[str, Path], name: str) -> None:
    model, _ = lowbit.load(folders[name])
    logits = quantized.logits(model)
    assert logits.isfinite().all()
    assert torch.equal(logits, quantized.logits(lowbit.load(folders[name])[0]))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BinaryLinear)}
    assert layers
    for n, layer in layers.items():
        parent, _, last = n.rpartition(".")
        owner = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj", "w3": "w1"}
        if last in owner:
            assert layer.mask is None and layer.owner is layers[f"{parent}.{owner[last]}"]
        else:
            assert layer.mask is not None and layer.owner is layer


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_sizes_are_those_of_the_formula_to_the_byte(folders: dict[str, Path], name: str) -> None:
    folder = QuantizedFolder(folders[name])
    for layer, entry in folder.entries.items():
        numbers = {k: v for k, v in entry.items() if k not in ("format", "bias")}
        stored = {
            tensor.removeprefix(f"{layer}."): info.bytes
            for tensor, info in folder.reader.tensors.items()
            if tensor.startswith(f"{layer}.")
        }
        stored.pop("bias", None)
        assert sum(stored.values()) == tensor_bytes(**numbers)
        assert ("mask" in stored) == (entry["shares"] is None)


def test_learned_scales_replay_to_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    again = METHOD.model_copy(update={"epochs": 0})
    out = quantized.quantize(
        quantized.source(), tmp_path / "out", again, start_from=folders["llama"]
    )
    before, after = quantized.contents(folders["llama"]), quantized.contents(out)
    shards = {n for n in before if n.startswith("model-")}
    assert len(shards) == 3 and all(before[n] == after[n] for n in shards)


def test_an_interrupted_run_ends_in_the_same_bytes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The first block is read from its shard, with the mask that its linears share."""
    whole, out = folders["llama"], copytree(folders["llama"], tmp_path / "out")
    for path in [*out.rglob("*00003-of-00003*"), out / "config.json"]:  # shard, learned, record
        path.unlink()
    quantized.quantize(quantized.source(), out, METHOD)
    assert quantized.contents(out) == quantized.contents(whole)
