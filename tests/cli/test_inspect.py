"""lowbit inspect."""

import json
import shutil

import pytest
from zoo import MODELS, rewrite

from lowbit.checkpoint.output import size_of
from lowbit.kernels.native.library import available

pytestmark = pytest.mark.slow

MODEL = MODELS / "llama-mini"
HEADER, BLOCKS, LINEARS = 2, 6, 7


def test_every_layer(lowbit, rtn):
    lines = lowbit("inspect", rtn).stdout.splitlines()
    assert lines[1].split() == [
        *("layer", "format", "backend", "bits", "group", "size", "bits", "dB")
    ]
    rows = [line.split() for line in lines[HEADER : HEADER + BLOCKS * LINEARS]]
    assert rows[0][:5] == [*("model.layers.0.self_attn.q_proj", "uniform", "reference", "4", "128")]
    assert [int(row[0].split(".")[2]) for row in rows] == [i // LINEARS for i in range(len(rows))]
    blocks = json.loads((rtn / "report.json").read_text())["blocks"]
    for name, *_, decibels in rows:
        block, linear = name.split(".self_attn.")[0].split(".mlp.")[0], name.split(".", 3)[3]
        found = blocks[block]["linears"][linear]["signal_to_noise_db"]
        assert float(decibels) == pytest.approx(found, abs=0.06)


def test_totals_and_provenance(lowbit, learned, story):
    found, text = size_of(learned), lowbit("inspect", learned).stdout
    facts = dict(line.split(maxsplit=1) for line in text.splitlines()[-10:])
    assert facts["linears"] == f"42 of {found.linears:.2f} bits per weight"
    assert facts["model"].startswith(f"{found.model:.2f} bits per parameter, ")
    assert facts["recipe"] == "omniquant-w2a16-g64 with epochs=1"
    assert facts["method"].startswith("omniquant (bits=2, group_size=64, ")
    assert facts["calibration"] == f"2 windows of 64 tokens of {story.name}"
    assert facts["seed"] == "0" and "torch" in text and facts["device"] == "cpu"


def test_backends_for_one_token_and_for_many(lowbit, story, tmp_path):
    text = ["--calibration", story, "--samples", "2", "--seqlen", "32"]
    method = ["--method", "ptq161", "--set", "epochs=0", "--only", "layers.0.*"]
    lowbit("quantize", MODEL, tmp_path / "out", *method, *text)
    for brief in ([], ["--brief"]):
        lines = lowbit("inspect", tmp_path / "out", *brief).stdout.splitlines()
        assert "backend: for one token and for many" in "".join(lines)
        rows = [line for line in lines if " binary " in line]
        assert len(rows) == LINEARS and all("lookup, reference" in row for row in rows)


@pytest.mark.exhaustive
def test_rounded_activations(lowbit, story, tmp_path):
    options = ["--set", "activation_bits=6", "--set", "epochs=0"]
    text = ["--calibration", story, "--samples", "2", "--seqlen", "32"]
    lowbit("quantize", MODEL, tmp_path / "out", "--method", "omniquant", *options, *text)
    lines = lowbit("inspect", tmp_path / "out").stdout.splitlines()
    assert lines[1].split() == [
        *("layer", "format", "backend", "bits", "group", "bits", "size", "bits", "dB")
    ]
    assert {tuple(line.split()[1:6]) for line in lines[HEADER : HEADER + BLOCKS * LINEARS]} == {
        ("uniform", "reference", "4", "row", "6")
    }
    attention = next(line for line in lines if line.startswith("attention"))
    assert attention.split(maxsplit=1)[1] == f"queries, keys and values of {BLOCKS} at 6 bits"


def test_proxy_losses(lowbit, story, tmp_path):
    out = tmp_path / "out"
    text = ["--calibration", story, "--samples", "2", "--seqlen", "32"]
    shown = lowbit("quantize", MODEL, out, "--method", "gptq", "--only", "layers.0.*", *text).stdout
    found = json.loads((out / "report.json").read_text())["blocks"]["model.layers.0"]["linears"]
    worst = max(facts["proxy_loss"] for facts in found.values())
    assert f"proxy loss up to {worst:#8.3g}" in shown
    lines = lowbit("inspect", out).stdout.splitlines()
    assert lines[1].split()[-2:] == ["proxy", "dB"] and "proxy: share of" in "".join(lines)
    for row in (line.split() for line in lines[HEADER : HEADER + LINEARS]):
        assert row[-2] == f"{found[row[0].removeprefix('model.layers.0.')]['proxy_loss']:.3g}"


def test_brief(lowbit, rtn):
    full = [line.split() for line in lowbit("inspect", rtn).stdout.splitlines()]
    rows = lowbit("inspect", rtn, "--brief").stdout.splitlines()[HEADER : HEADER + LINEARS]
    assert rows[0].startswith("model.layers.{0-5}.self_attn.q_proj")
    same = [row for row in full if row and row[0].endswith("self_attn.q_proj")]
    assert rows[0].split()[-1] == min(row[-1] for row in same)


def test_layers_that_transformers_renames(lowbit, tmp_path):
    """On disk block_sparse_moe.experts.0.w1, in memory mlp.experts.0.gate_proj."""
    model = rewrite("mixtral", tmp_path / "mixtral", experts=2)
    lowbit("quantize", model, tmp_path / "out", "--method", "rtn")
    lines = lowbit("inspect", tmp_path / "out").stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith("model.layers.")]
    assert len(rows) == BLOCKS * (4 + 2 * 3)
    assert any("block_sparse_moe.experts.1.w2" in row[0] for row in rows)
    assert all(10 < float(row[-1]) < 40 for row in rows)


def test_a_float_folder(lowbit):
    text = lowbit("inspect", MODEL).stdout
    assert text == (
        f"{MODEL} is a float model: 16.00 bits per parameter, 9.91 MB; nothing in it is quantized\n"
    )


def test_mistakes(lowbit, rtn, tmp_path):
    assert "/nowhere: there is no such folder" in lowbit("inspect", "/nowhere", code=1).stderr
    broken = shutil.copytree(rtn, tmp_path / "broken")
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert shard.name in lowbit("inspect", broken, code=1).stderr
    (broken / "report.json").write_text('{"blocks": [1]}')
    shutil.copyfile(rtn / shard.name, shard)
    error = lowbit("inspect", broken, code=1).stderr
    assert "report.json cannot be used: blocks: should be a mapping of names to values" in error
    (broken / "report.json").unlink()
    assert "uniform" in lowbit("inspect", broken).stdout
    (broken / "config.json").unlink()
    assert "is unfinished" in lowbit("inspect", broken, code=1).stderr


@pytest.mark.kernels
def test_memory(lowbit, rtn):
    """Without kernels, the codes as they are stored and float tensors in float32."""
    text = lowbit("inspect", rtn).stdout
    line = next(line for line in text.splitlines() if line.startswith("in memory"))
    with_kernels = "of it for the kernels; " in line and 'with kernels="replace"' in line
    assert " on the CPU, " in line and with_kernels == bool(available())
