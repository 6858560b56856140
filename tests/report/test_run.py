"""Each linear of real folders is in its block, with everything that is known about it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import quantized

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.report import read_run


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_every_linear_with_its_error(name: str) -> None:
    folder = quantized.folder(name, "omniquant")
    run = read_run(folder)
    report = json.loads((folder / "report.json").read_text())
    found = {
        f"{block.name}.{linear.name}": linear
        for block in run.blocks
        for layer in block.layers
        for linear in layer.linears
    }
    assert found.keys() == set(QuantizedFolder(folder).entries)
    for block, facts in report["blocks"].items():
        for linear, known in facts["linears"].items():
            assert found[f"{block}.{linear}"].error == known["signal_to_noise_db"]
    weights = sum(linear.weights for linear in found.values())
    bits = 8 * sum(linear.bytes for linear in found.values()) / weights
    assert bits == pytest.approx(size_of(folder).linears)
    assert {linear.name for linear in found.values() if linear.fallback} == {
        name.split(".", 3)[3] for name in report["fallbacks"] if ".experts." in name
    }


def test_a_run_with_its_history() -> None:
    folder = quantized.folder("llama", "omniquant")
    run = read_run(folder)
    assert [block.number for block in run.blocks] == [0, 1]
    for block in run.blocks:
        facts = json.loads((folder / "report.json").read_text())["blocks"][block.name]
        assert block.curve == [facts["loss_before"], *facts["training"]["curve"]]
        assert block.loss_saved == pytest.approx(1 - facts["loss_after"] / facts["loss_rtn"])
        assert block.history.seconds is not None and block.history.memory is not None
        assert block.worst is not None
        assert block.worst.error == min(layer.error for layer in block.layers)
    assert run.memory == max(block.history.memory for block in run.blocks)
    assert run.history.starts == 1 and run.date.startswith("20")
    assert (run.float_dtype, run.title) == ("float32", quantized.source().name)
    assert run.times_smaller == pytest.approx(32 / size_of(folder).model)


def test_without_report_and_events(tmp_path: Path) -> None:
    """A sliced or converted folder has no report; only what is stored is shown."""
    folder = Path(shutil.copytree(quantized.folder(), tmp_path / "bare"))
    for name in ("report.json", "events.jsonl"):
        (folder / name).unlink()
    run = read_run(folder)
    assert [block.name for block in run.blocks] == ["model.layers.0", "model.layers.1"]
    assert len(run.layers) == 14 and all(layer.error is None for layer in run.layers)
    assert run.date == "" and run.memory is None and run.blocks[0].worst is None
    assert run.blocks[0].bits == pytest.approx(run.size.linears)


def test_an_exact_copy(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized.folder(), tmp_path / "exact"))

    def make_exact(report: dict) -> None:
        linears = report["blocks"]["model.layers.1"]["linears"]
        linears["mlp.up_proj"] = {"signal_to_noise_db": None}

    quantized.edit_json(folder / "report.json", make_exact)
    quantized.seal(folder)
    errors = {layer.name: layer.error for layer in read_run(folder).blocks[1].layers}
    assert errors["mlp.up_proj"] == math.inf and errors["mlp.down_proj"] < 50


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not quantized by lowbit"):
        read_run(quantized.source())
    folder = Path(shutil.copytree(quantized.folder(), tmp_path / "edited"))

    def forge(config: dict) -> None:
        config["quantization_config"]["made_by"]["method"] = "mine"

    quantized.edit_json(folder / "config.json", forge)
    quantized.seal(folder)
    with pytest.raises(
        ValueError, match="made_by in .*config.json cannot be used: method.*: restore"
    ):
        read_run(folder)
