"""lowbit plan: one table, and the same numbers in a file."""

import json

import pytest
from zoo import MODELS

pytestmark = pytest.mark.slow

MODEL = MODELS / "llama-mini"


def rows(text: str) -> dict[str, str]:
    """The rows of the table, by their first column."""
    lines = text.splitlines()[1:]
    return {line[:17].strip(): line[17:].strip() for line in lines}


@pytest.mark.exhaustive
def test_learned(lowbit, learning, tmp_path):
    file = tmp_path / "plan.json"
    text = lowbit("plan", MODEL, *learning, "--json", file).stdout
    found = json.loads(file.read_text())
    assert text.splitlines()[0].strip() == f"{MODEL}: omniquant-w2a16-g64 with epochs=1"
    shown = rows(text)
    assert shown["bits per weight"] == "2.38 in the linears, 3.83 in the model"
    assert shown["size"] == "2.38 MB (was 9.91 MB)"
    assert "hidden states (" in shown["peak memory"] and "in memory" in shown["peak memory"]
    assert shown["time"].endswith("per block, on cpu")
    assert "model.layers.0 of 6 blocks, 2 of 2 batches" in shown["derived from"]
    assert "peak GPU memory" not in shown
    assert round(found["linears"], 2) == 2.38 and found["learned"] > 0


def test_without_text(lowbit):
    text = lowbit("plan", MODEL, "--recipe", "rtn-w4a16-g128", "--calibration", "c4").stdout
    assert "rtn needs no calibration text: --calibration is ignored" in text
    assert "4.16 in the linears" in text and "hidden states" not in text and "learned" not in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--method", "rtm"), "'rtm' is not a method: did you mean 'rtn'?"),
        (("--method", "rtn", "--json", "/nowhere/x.json"), "--json /nowhere/x.json: it is"),
        (("--method", "rtn", "--only", "none"), "none"),
    ],
)
def test_mistakes(lowbit, options, sentence):
    result = lowbit("plan", MODEL, *options, code=1)
    assert result.stderr.startswith("error: ") and sentence in result.stderr
