"""Damage to files: edits of JSON and of bytes, as hypothesis strategies and their functions."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import quantized
from hypothesis import strategies as st

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
    10**30,
    0.5,
    float("nan"),
    "",
    "a",
    "float16",
    "lowbit",
]
VALUES += [[], {}, [1, 2], {"a": 1}, "uniform", "../x", "\ud800\0"]
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


def edit(tree: Any, steps: list[int], action: str, value: Any) -> None:
    """Follows `steps` down a tree of dictionaries and lists, and edits the value there in place."""
    children = [k for k, v in enumerated(tree) if isinstance(v, dict | list) and v]
    if len(steps) > 1 and children:
        key = children[steps[0] % len(children)]
        return edit(tree[key], steps[1:], action, value)
    value = deepcopy(value)
    keys = [key for key, _ in enumerated(tree)]
    key = keys[steps[0] % len(keys)]
    if action == "replace":
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


def change_json(path: Path, edits: list[tuple[Any, ...]]) -> None:
    def change(tree: Any) -> None:
        for one in edits:
            if tree:
                edit(tree, *one)

    quantized.edit_json(path, change)
