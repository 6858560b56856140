"""The examples run, on little text, and print what they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
@pytest.mark.kernels
def test_demo(tmp_path: Path) -> None:
    printed = run("demo.py", "--out", tmp_path / "out", "--samples", 2, "--windows", 4)
    lines = (re.split(r"\s{2,}", line.strip()) for line in printed.splitlines())
    rows = {
        name: [float(re.sub(r"[^\d.+-]", "", cell)) for cell in cells]
        for name, *cells in lines
        if name in ("float", "fast-4bit", "best-2bit", "best-1.5bit") and len(cells) > 5
    }
    rows["float"][4:4] = [0.0]  # of which two cells are empty
    rows["float"].append(0.0)
    assert list(rows) == ["float", "fast-4bit", "best-2bit", "best-1.5bit"]
    linears, model, size, perplexity, _, speed, ratio, seconds = zip(*rows.values(), strict=True)
    assert linears == (16, 4.16, 2, 1.5)
    assert model[0] == 16 > model[1] > model[2] > model[3] > 1.5
    assert size[0] > size[1] > size[2] > size[3]
    assert perplexity[0] < perplexity[1] < perplexity[2] < perplexity[3]
    assert (
        all(value > 0 for value in speed) and ratio[0] == 1 and seconds[0] == 0 < min(seconds[1:])
    )
    for name in rows:
        assert f"\n{name}\nOnce upon a time there was a little fox who" in printed
    assert list((tmp_path / "out" / "fast-4bit-gguf").glob("*.gguf"))
    assert "python examples/demo.py --model MODEL" in printed


@pytest.mark.exhaustive
def test_train_mini(tmp_path: Path) -> None:
    stories = tmp_path / "stories.txt"
    story = "Once there was a fox. It ran and ran until it was home. The end. "
    stories.write_text("\n<|endoftext|>\n".join([story * 40] * 20))
    books = tmp_path / "books.txt"
    books.write_text(story * 400)
    for kind in ("llama", "opt"):
        texts = (
            "--stories",
            stories,
            "--books",
            books,
            "--tokenizer",
            EXAMPLES / "models/llama-mini",
        )
        printed = run("train_mini.py", kind, tmp_path / kind, *texts, "--steps", 2, "--window", 64)
        assert "held-back perplexity" in printed
        assert (tmp_path / kind / "model.safetensors").exists()


@pytest.mark.exhaustive
def test_the_notebook_was_run_and_its_code_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    notebook = json.loads((EXAMPLES / "mixedquant_demo.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(
        out["output_type"] in ("stream", "display_data") for c in cells for out in c["outputs"]
    )
    little = (
        "".join(cells[0]["source"]).replace("samples=8", "samples=2").replace("limit=12", "limit=1")
    )
    names: dict[str, Any] = {}
    exec(little, names)
    perplexity, bits = names["quantize"]("outliers", group_size=64)
    assert 10 < perplexity < 40 and 4.2 < bits < 5
