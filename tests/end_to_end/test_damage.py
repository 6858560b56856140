"""A damaged folder is refused by a ValueError of ours, or loads as the model that it was.

Three kinds of damage: bytes of a shard, config.json, the index. Once as accidents leave them, when
hash or digest must betray whatever they cover; and once with all checksums forged, so that what
lies behind them is reached: then another model may come out, but still no other error.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from damage import BYTES, EDITS, change_json, damage, edit
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import lowbit
from lowbit.checkpoint.reader import INDEX

pytestmark = pytest.mark.slow

bounded = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
)
forged_or_not = pytest.mark.parametrize("forged", [False, True], ids=["accident", "forged"])


@cache
def wanted() -> torch.Tensor:
    return quantized.logits(lowbit.load(quantized.folder())[0])


@contextmanager
def copied() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(quantized.folder(), Path(place) / "out"))


def judge(folder: Path, forged: bool) -> None:
    """A damaged folder must raise a ValueError, or load as the same model; forged: as any model."""
    try:
        model, _ = lowbit.load(folder)
    except ValueError as error:
        assert str(folder) in str(error), error  # names the file, or the folder and what is in it
        return
    logits = quantized.logits(model)
    assert forged or torch.equal(logits, wanted())


@forged_or_not
@bounded
@given(st.integers(0, 2), st.lists(BYTES, min_size=1, max_size=2))
def test_bytes_of_a_shard(forged: bool, shard: int, changes: list[tuple[Any, ...]]) -> None:
    with copied() as folder:
        path = sorted(folder.glob("*.safetensors"))[shard]
        data = path.read_bytes()
        for change in changes:
            data = (
                damage(data, *change)
                if len(data) > 8 + int.from_bytes(data[:8], "little")
                else data
            )
        path.write_bytes(data)
        if forged:
            quantized.seal(folder)
        judge(folder, forged)


@bounded
@given(st.integers(0, 2), st.lists(EDITS, min_size=1, max_size=2))
def test_fields_of_a_shards_header(shard: int, edits: list[tuple[Any, ...]]) -> None:
    """Edits names, dtypes, shapes and offsets, which random bytes seldom hit; always forged."""
    with copied() as folder:
        path = sorted(folder.glob("*.safetensors"))[shard]
        data = path.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:size])
        for change in edits:
            edit(header, *change)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[size:])
        quantized.seal(folder)
        judge(folder, forged=True)


@forged_or_not
@bounded
@given(st.lists(EDITS, min_size=1, max_size=3))
def test_config(forged: bool, edits: list[tuple[Any, ...]]) -> None:
    with copied() as folder:
        change_json(folder / "config.json", edits if forged else edits[:1])
        if forged and isinstance(section_of(folder), dict):
            quantized.seal(folder)
        judge(folder, forged)


def section_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


@forged_or_not
@bounded
@given(st.lists(EDITS, min_size=1, max_size=3))
def test_entries_of_the_layers(forged: bool, edits: list[tuple[Any, ...]]) -> None:
    def change(config: dict[str, Any]) -> None:
        for one in edits:
            edit(config["quantization_config"]["modules"], *one)

    with copied() as folder:
        quantized.edit_json(folder / "config.json", change)
        if forged:
            quantized.seal(folder)
        judge(folder, forged)


@bounded
@given(st.lists(EDITS, min_size=1, max_size=3))
def test_index(edits: list[tuple[Any, ...]]) -> None:
    """No checksum covers the index: every change is detected, or has no effect."""
    with copied() as folder:
        change_json(folder / INDEX, edits)
        judge(folder, forged=False)
