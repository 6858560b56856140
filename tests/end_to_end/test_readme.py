"""The commands and the Python code of README run, on a small model and a text file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import quantized

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "meta-llama/Llama-3.2-1B"
MODEL, TEXT = quantized.source(), quantized.text()
# In place of the data sets of the hub, which tests must not reach.
CALIBRATION = f" --calibration {TEXT} --samples 2 --seqlen 16"
MORE = {
    "plan": CALIBRATION,
    "quantize": CALIBRATION,
    "eval": f" --text {TEXT} --seqlen 16 --limit 2",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith("lowbit ")]


def run(folder: Path, *command: str) -> str:
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
def test_the_commands_run_in_their_order(tmp_path: Path) -> None:
    found = commands()
    assert [line.split()[1] for line in found] == ["plan", "quantize", "eval", "generate", "report"]
    for line in found:
        name = line.split()[1]
        words = re.findall(r'"[^"]*"|\S+', (line + MORE.get(name, "")).replace(HUB_ID, str(MODEL)))
        assert run(tmp_path, "-m", "lowbit", *(word.strip('"') for word in words[1:])).strip()
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.exhaustive
def test_the_python_code_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
    given = f'lowbit.Calibration(sources=["{TEXT}"], samples=2, seqlen=16)'
    fields = "bits=4, group_size=128"
    assert f"OmniQuant({fields}))" in code
    code = code.replace(f"OmniQuant({fields}))", f"OmniQuant({fields}, epochs=1), {given})")
    run(tmp_path, "-c", code.replace(HUB_ID, str(MODEL)) + "\nassert tokenizer and model")


def test_every_recipe_that_is_named_exists() -> None:
    from lowbit.recipes import recipe_names

    methods = "rtn|gptq|omniquant|matquant|ptq161|mixedquant|quip|trellis"
    named = set(re.findall(rf"`((?:{methods})-[a-z0-9.-]+)`", README))
    named -= {name for name in named if name.endswith("-")}
    assert named and named <= set(recipe_names())
