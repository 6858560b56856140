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
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
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

VALUES = [
    None,
    True,
    0,
    1,
    -1,
    3,
    100,
    2**40,
    2**70,
    0.5,
    float("nan"),
    "",
    "a",
    "float16",
    "lowbit",
]
VALUES += [[], {}, [1, 2], {"a": 1}, "uniform", "../x", "\ud800\0"]
ENDLESS = ("num_hidden_layers",)  # as many as these would be built one after another
# Where in a tree of JSON (each number picks a child), what is done there, with which value.
EDITS = st.tuples(
    st.lists(st.integers(0, 30), min_size=1, max_size=5),
    st.sampled_from(["replace", "replace", "delete", "add", "rename"]),
    st.sampled_from(VALUES),
)
# Which byte, counted within the header or from the end of the file; what is done there.
BYTES = st.tuples(
    st.sampled_from(["header", "data"]),
    st.integers(0, 5000),
    st.sampled_from(["flip", "set", "cut", "drop", "insert"]),
    st.integers(0, 255),
)


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
    if not forged:
        assert torch.equal(quantized.logits(model), wanted())


def edit(tree: Any, steps: list[int], action: str, value: Any) -> None:
    """Follows `steps` down a tree of dictionaries and lists, and edits the value there in place."""
    children = [k for k, v in enumerated(tree) if isinstance(v, dict | list) and v]
    if len(steps) > 1 and children:
        key = children[steps[0] % len(children)]
        return edit(tree[key], steps[1:], action, value)
    value = deepcopy(value)
    keys = [key for key, _ in enumerated(tree)]
    key = keys[steps[0] % len(keys)]
    if action == "replace" and not (key in ENDLESS and isinstance(value, int)):
        tree[key] = value
    elif action == "delete":
        del tree[key]
    elif action == "add" and isinstance(tree, dict):
        tree[str(value).encode("utf-8", "replace").decode()] = value
    elif action == "rename" and isinstance(tree, dict):
        tree[f"{key}s"] = tree.pop(key)


def enumerated(tree: Any) -> list[tuple[Any, Any]]:
    return list(tree.items() if isinstance(tree, dict) else enumerate(tree))


def damage(data: bytes, where: str, place: int, action: str, byte: int) -> bytes:
    header = 8 + int.from_bytes(data[:8], "little")
    at = place % header if where == "header" else len(data) - 1 - place % (len(data) - header)
    before, here, behind = data[:at], data[at], data[at + 1 :]
    return {
        "flip": before + bytes([here ^ 1 << byte % 8]) + behind,
        "set": before + bytes([byte]) + behind,
        "cut": before,
        "drop": before + behind,
        "insert": before + bytes([byte, here]) + behind,
    }[action]


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


def change_json(path: Path, edits: list[tuple[Any, ...]]) -> None:
    def change(tree: Any) -> None:
        for one in edits:
            if tree:
                edit(tree, *one)

    quantized.edit_json(path, change)
