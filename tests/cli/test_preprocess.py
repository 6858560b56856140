"""lowbit preprocess, and quantize and eval with the folder that it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import quantized

from lowbit.preprocess import LoRA
from lowbit.recipes import load_recipe

pytestmark = pytest.mark.slow

RECIPE = """
description: small
method: rtn
fields: {{bits: 2, group_size: 16}}
calibration: {{samples: 2, seqlen: 16}}
lora: {{rank: 2, seqlen: 16, steps: 4, sources: [{text}]}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(text=quantized.text()))
    return path


def test_the_published_settings() -> None:
    lora = LoRA(**load_recipe("ptq161-lora").lora or {})
    assert (lora.rank, lora.alpha, lora.dropout) == (64, 16, 0.1)
    assert lora.windows == 20_000 and lora.learning_rate == 1e-4


def test_from_a_recipe_to_a_labelled_row(lowbit: Any, tmp_path: Path, recipe: Path) -> None:
    out, packed, rows = tmp_path / "out", tmp_path / "packed", tmp_path / "rows.json"
    given = ["--recipe", recipe, "--set", "lora.steps=2", "--set", "bits=3"]
    text = lowbit("preprocess", quantized.source(), out, *given).stdout
    assert "training: 2 steps, 64 tokens" in text and "step 2/2, loss" in text
    recorded = json.loads((out / "config.json").read_text())["lowbit_preprocess"]
    losses = [recorded["training"][f"loss_{when}"] for when in ("before", "after")]
    assert f"held-out loss {losses[0]:.3f} → {losses[1]:.3f}" in text
    assert (recorded["first_pass"]["bits"], recorded["lora"]["steps"]) == (3, 2)
    lowbit("quantize", out, packed, "--method", "rtn")
    table = lowbit("eval", out, packed, "--text", quantized.text(), "--json", rows).stdout
    assert "out after LoRA" in table and "packed after LoRA" in table
    methods = {row["method"] for row in json.loads(rows.read_text()).values()}
    assert methods == {"float after LoRA", "rtn after LoRA"}


def test_training_that_does_not_help_is_reported(lowbit: Any, tmp_path: Path, recipe: Path) -> None:
    given = ["--recipe", recipe, "--set", "lora.learning_rate=0.3"]
    text = lowbit("preprocess", quantized.source(), tmp_path / "out", *given).stdout
    assert "warning: training did not help: lower lora.learning_rate" in text


def test_such_a_recipe_is_not_for_quantize(lowbit: Any, tmp_path: Path) -> None:
    given = (quantized.source(), tmp_path / "out", "--recipe", "ptq161-lora")
    found = lowbit("quantize", *given, code=1).stderr
    assert "recipe ptq161-lora is for lowbit preprocess" in found


@pytest.mark.parametrize(
    ("setting", "message"),
    [("lora.step=2", "did you mean 'steps'"), ("lora.rank=0", "rank: should be greater")],
)
def test_settings_are_checked(
    lowbit: Any, tmp_path: Path, recipe: Path, setting: str, message: str
) -> None:
    given = ["--recipe", recipe, "--set", setting]
    found = lowbit("preprocess", quantized.source(), tmp_path / "out", *given, code=1)
    assert message in found.stderr
