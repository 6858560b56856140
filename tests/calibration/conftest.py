"""Fixtures: a tokenizer, files, and a replacement for the hub."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from texts import C4, PILE, PTB, WIKITEXT, make_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a file, bytes or text or rows, and returns its path."""

    def write_file(name: str, content: bytes | str | list) -> str:
        path = tmp_path / name
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(content).to_parquet(path)
        elif isinstance(content, list):
            path.write_text("\n".join(map(json.dumps, content)) + "\n")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Replaces the hub: "rows" by data set id, and the "calls" that were made."""
    state: dict = {"rows": {}, "calls": []}

    def load_dataset(path: str, name: str | None = None, **options) -> datasets.Dataset:
        state["calls"].append((path, name, options))
        rows = state["rows"][path]
        if isinstance(rows, Exception):
            raise rows
        column = "sentence" if path == PTB else "text"
        return datasets.Dataset.from_dict({"id": range(len(rows)), column: rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    state["rows"] = {
        WIKITEXT: ["", " = Title = ", "some words of an article"] * 20,
        PTB: ["a sentence of a newspaper", "another one"] * 30,
        C4: [letter * length for letter in "abcdef" for length in (3, 31, 40)],
        PILE: ["a page of the pile"] * 1200,
    }
    return state
