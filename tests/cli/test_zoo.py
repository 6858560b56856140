"""lowbit zoo, on the zoo that the repository carries."""

from pathlib import Path

import pytest
from zoo import MODELS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_zoo_of_the_repository(lowbit, tmp_path):
    listed = lowbit("zoo", "list", "--from", ROOT).stdout
    assert "llama-mini-ptq161" in listed
    name = "llama-mini-ptq161"
    said = lowbit("zoo", "get", name, tmp_path, "--from", ROOT).stdout
    assert f"lowbit zoo replay {name} MODEL OUT --from {tmp_path}" in said
    model, out = MODELS / "llama-mini", tmp_path / "out"
    said = lowbit("zoo", "replay", name, model, out, "--from", tmp_path).stdout
    assert f"as {name} (" in said
    result = lowbit("zoo", "replay", name, MODELS / "opt-mini", out, "--from", ROOT, code=1)
    assert "what was learned is for that model alone" in result.stderr


def test_mistakes(lowbit, tmp_path):
    assert "has no folder zoo" in lowbit("zoo", "list", "--from", tmp_path, code=1).stderr
    lowbit("zoo", "give", code=2)
