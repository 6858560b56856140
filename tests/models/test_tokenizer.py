"""What is no tokenizer is said in one sentence, whatever transformers makes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import zoo

from lowbit.models.tokenizer import load_tokenizer

FILE = "tokenizer.json"


@pytest.mark.parametrize("damage", [None, {}, {"model": {"type": "Foo"}}, {"pre_tokenizer": 1}])
def test_a_damaged_tokenizer(damage: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(
        zoo.MODELS / "llama-mini", folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    whole = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text("" if damage is None else json.dumps(damage and whole | damage))
    with pytest.raises(ValueError, match="model has no tokenizer that can be loaded: .") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
