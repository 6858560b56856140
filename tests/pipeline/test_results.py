"""Results of a block on disk; reports name linears as on disk."""

import json
import shutil
from pathlib import Path

import pytest
import quantized

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.models.source import SourceModel
from lowbit.pipeline.results import block_on_disk, left_float, run_report

FEW = lowbit.methods.GPTQ(min_tokens=10_000)


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    """OPT as `OPTModel` saves it: on disk decoder.layers.0, in memory model.decoder.layers.0."""
    folder = Path(shutil.copytree(quantized.source("opt"), tmp_path / "headless"))

    def behead(tensors: dict[str, object]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    quantized.edit_shard(folder / "model.safetensors", behead)
    return folder


def test_the_block_and_its_linears(headless: Path, tmp_path: Path) -> None:
    source = SourceModel(headless)
    assert source.block_names[1] == "model.decoder.layers.1"
    assert block_on_disk(source, "model.decoder.layers.1") == "decoder.layers.1"
    out = quantized.quantize(headless, tmp_path / "out", FEW)
    report = json.loads((out / "report.json").read_text())
    entries = set(QuantizedFolder(out).entries)
    assert "decoder.layers.1.self_attn.q_proj" in entries
    listed = {f"{block}.{name}" for block, r in report["blocks"].items() for name in r["linears"]}
    assert listed == entries == set(report["fallbacks"])


def test_the_report_is_made_of_the_records() -> None:
    up = {"linears": {"up": {"signal_to_noise_db": None, "fallback": "why"}}}
    blocks = {"h.0": up, "h.1": {}}
    records = [{"file": "outside"}, *({"on_disk": n, "report": r} for n, r in blocks.items())]
    assert run_report(records, ["h.1.gate"]).to_json() == {
        "fallbacks": {"h.0.up": "why"},
        "left_float": ["h.1.gate"],
        "blocks": blocks,
    }


def test_one_linear_is_the_whole_block() -> None:
    """The common start of all names of its tensors is longer than the name of the block."""

    class Source:
        def block_tensors(self, block: str) -> list[str]:
            return ["h.1.mlp.1.weight", "h.1.mlp.1.bias"]

    assert block_on_disk(Source(), "transformer.h.1") == "h.1"


def test_what_is_left_float() -> None:
    found = left_float(SourceModel(quantized.source("mixtral")), [])
    assert found == [f"model.layers.{i}.block_sparse_moe.gate" for i in range(2)]
    allowed = ("*.conv_1d", "*.rg_lru.*")
    matrices = left_float(SourceModel(quantized.source("recurrent_gemma"), allowed), [])
    block = "model.layers.0.temporal_block"
    assert {f"{block}.conv_1d", f"{block}.rg_lru.input_gate_weight"} < set(matrices)


@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_the_report_lists_every_linear(name: str) -> None:
    """Mixtral's experts have different names in memory and on disk."""
    report = json.loads((quantized.folder(name) / "report.json").read_text())
    entries = QuantizedFolder(quantized.folder(name)).entries
    listed = {
        f"{b}.{linear}" for b, facts in report["blocks"].items() for linear in facts["linears"]
    }
    assert listed == set(entries)
