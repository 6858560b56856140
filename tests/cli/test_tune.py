"""lowbit tune, and the label of its folder in every command that shows it."""

from pathlib import Path
from typing import Any

import pytest
import quantized

pytestmark = pytest.mark.slow

TEXT = ("--calibration", "--samples", "--seqlen", "--steps", "--batch", "--device")


def given(folder: Path, out: Path, *more: object) -> list[object]:
    text = dict(zip(TEXT, (quantized.text(), 8, 16, 3, 2, "cpu"), strict=True))
    pairs = [part for pair in text.items() for part in pair]
    return ["tune", folder, "--reference", quantized.source(), "-o", out, *pairs, *more]


@pytest.mark.exhaustive
def test_a_tuned_folder_says_so_everywhere(lowbit: Any, tmp_path: Path) -> None:
    folder, out = quantized.folder("llama", "quip"), tmp_path / "out"
    text = lowbit(*given(folder, out, "--rate", 0.01)).stdout
    assert "predictions of the float model" in text and "training: 3 steps, 96 tokens" in text
    assert "step 3/3, KL" in text and "tuned: held-out KL" in text
    assert "bits per weight in the linears (was" in text  # signs became numbers
    shown = lowbit("inspect", out).stdout
    assert "3 steps on 96 tokens; KL from the float model" in shown
    table = lowbit("eval", folder, out, "--text", quantized.text(), "--seqlen", 16).stdout
    assert "out tuned" in table and "quip tuned" not in table.split("out tuned")[0]
    assert "| tuned | 3 steps on 96 tokens" in (out / "README.md").read_text()
    lowbit("report", out)
    assert "quip tuned" in (out / "report.html").read_text()
    assert lowbit("verify", out).exit_code == 0


def test_nothing_gained_is_said(lowbit: Any, tmp_path: Path) -> None:
    folder, out = quantized.folder("llama", "quip"), tmp_path / "out"
    text = lowbit(*given(folder, out, "--rate", 0.9)).stdout
    assert "no step made the model better" in text and "so OUT is a copy of MODEL" in text
    assert "tuned" not in lowbit("inspect", out).stdout


def test_mistakes_are_one_sentence(lowbit: Any, tmp_path: Path) -> None:
    folder, out = quantized.folder("llama", "quip"), tmp_path / "out"
    assert "steps: should be greater" in lowbit(*given(folder, out, "--steps", 0), code=1).stderr
    assert "blocks: " in lowbit(*given(folder, out, "--blocks", "tape"), code=1).stderr
