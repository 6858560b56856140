"""Folders of layout version 1, as lowbit 0.1 wrote them, keep working.

They are checkpoint/version_1/NAME. Beside them, logits.safetensors has what each of them computed
for `tokens`, and dequantized.json a hash of the weights that each of them stands for.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.cli import app
from lowbit.convert import dequantize, slice_folder
from lowbit.report import read_run, render

pytestmark = pytest.mark.slow

FOLDERS = Path(__file__).parents[1] / "checkpoint" / "version_1"
LOGITS = load_file(FOLDERS / "logits.safetensors")
DIGESTS = json.loads((FOLDERS / "dequantized.json").read_text())
SAME = 1e-5  # relative: float32 may be added up in another order
FORMATS = {
    "uniform": {"uniform"},
    "opt": {"uniform"},
    "activations": {"uniform"},
    "nested": {"nested", "uniform"},
    "nested_slice": {"nested"},
    "lattice": {"lattice"},
    "lattice_residual": {"lattice"},
    "binary": {"binary"},
    "sorted_group": {"sorted_group"},
    "mixtral": {"dense", "uniform"},
}
every_folder = pytest.mark.parametrize("name", FORMATS)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(LOGITS["tokens"]).logits


def digest(folder: Path) -> str:
    """A hash of all tensors, whatever files they are in."""
    reader, found = CheckpointReader(folder), hashlib.sha256()
    for name, tensor in sorted(reader.read(reader.tensors).items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_every_folder_is_tested() -> None:
    assert {path.name for path in FOLDERS.iterdir() if path.is_dir()} == set(FORMATS)
    for name, formats in FORMATS.items():
        folder = QuantizedFolder(FOLDERS / name)
        assert folder.quantization["version"] == 1
        assert {entry["format"] for entry in folder.entries.values()} == formats
        assert all("dtype" not in e or e["format"] == "dense" for e in folder.entries.values())


@every_folder
def test_it_computes_the_same(name: str) -> None:
    QuantizedFolder(FOLDERS / name).verify()
    ours, tokenizer = lowbit.load(FOLDERS / name)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDERS / name)
    for model in (ours, theirs):
        assert zoo.error(logits(model), LOGITS[name]) < SAME
    assert tokenizer("abc")["input_ids"] == [0, 1, 2]


@every_folder
def test_it_stands_for_the_same_weights(name: str, tmp_path: Path) -> None:
    assert digest(dequantize(FOLDERS / name, tmp_path / "dense")) == DIGESTS[name]


@every_folder
def test_it_is_inspected_and_reported(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(FOLDERS / name), "--verify"])
    assert result.exit_code == 0, result.output
    run = read_run(FOLDERS / name)
    assert f"{run.times_smaller:.1f} times smaller than {run.float_dtype}" in render(run)
    has_report = (FOLDERS / name / "report.json").exists()
    assert has_report == any(layer.error is not None for layer in run.layers)


@pytest.mark.parametrize("nested", [False, True])
def test_it_is_sliced(nested: bool, tmp_path: Path) -> None:
    """To a folder of version 1, whose entries do not say their dtype either."""
    folder = FOLDERS / "nested"
    out = slice_folder(folder, tmp_path / "slice", 4, nested=nested)
    made = QuantizedFolder(out)
    made.verify()
    assert made.quantization["version"] == 1
    assert made.float_dtype(next(iter(made.entries))) == torch.bfloat16
    whole, _ = lowbit.load(folder)
    lowbit.set_bits(whole, 4)
    assert torch.equal(logits(lowbit.load(out)[0]), logits(whole))


def test_damage_is_seen(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDERS / "binary", tmp_path / "out"))
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="is damaged"):
        lowbit.load(folder)
