"""Descriptions of types, limits and defaults."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from lowbit.fields import field_texts, section, shown


class Inner(BaseModel):
    x: int = 1


class Made(BaseModel):
    both: int = Field(4, ge=2, le=8)
    optional: int | None = Field(None, ge=1)
    above: float = Field(0.01, gt=0)
    above_and_most: float | None = Field(None, gt=0, le=1)
    below: float = Field(0.2, ge=0, lt=1)
    yes: bool = False
    one_of: Literal["auto", "memory", "disk"] = "auto"
    only: Literal["x"] = "x"
    numbers: Literal[8, 16] = 16
    either: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    names: tuple[str, ...] = ("a", "b")
    several: list[int] = Field([8, 4], min_length=1)
    mixed: tuple[int | str, ...] = ()
    limited: list[Annotated[int, Field(gt=0)]] = []
    mapping: dict[str, dict[str, Any]] = {"a": {"bits": 4}}
    path: Path | None = None
    anything: Any = None
    inner: Inner | None = None
    large: int = Field(0, ge=0, lt=2**20)
    needed: int = Field(description="What must be given.")


WORDS = {
    "both": "integer from 2 to 8; default 4",
    "optional": "integer of at least 1, or None; default None",
    "above": "number above 0; default 0.01",
    "above_and_most": "number above 0, at most 1, or None; default None",
    "below": "number of at least 0, below 1; default 0.2",
    "yes": "True or False; default False",
    "one_of": '"auto", "memory" or "disk"; default "auto"',
    "only": '"x"; default "x"',
    "numbers": "8 or 16; default 16",
    "either": '"auto", or number above 0; default "auto"',
    "names": 'list of texts; default ["a", "b"]',
    "several": "list of one or more integers; default [8, 4]",
    "mixed": "list of integers or texts; default []",
    "limited": "list of integers; default []",
    "mapping": 'mapping; default {"a": {"bits": 4}}',
    "path": "path, or None; default None",
    "anything": "any value; default None",
    "inner": "Inner, or None; default None",
    "large": "integer of at least 0, below 1,048,576; default 0",
    "needed": "integer; required",
}


@pytest.mark.parametrize("name", WORDS)
def test_types_and_defaults(name: str) -> None:
    found = {text.name: text.facts for text in field_texts(Made.model_fields)}
    assert found[name] == WORDS[name]


def test_every_kind_is_tried() -> None:
    assert WORDS.keys() == Made.model_fields.keys()


def test_a_section_lists_all() -> None:
    assert section({}) == ""
    assert section({"needed": Made.model_fields["needed"]}) == (
        "Fields:\n    needed: integer; required\n        What must be given."
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(5e-5, "5e-05"), (1.0, "1"), (None, "None"), (Path("a/b"), '"a/b"'), (("x", 2), '["x", 2]')],
)
def test_values(value: object, text: str) -> None:
    assert shown(value) == text
