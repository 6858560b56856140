"""Configuration classes: strict about names, and readable when something is wrong."""

import pytest
from pydantic import Field, ValidationError

from lowbit.config import Config, explain


class Inner(Config):
    size: int = Field(1, ge=1)


class Outer(Config):
    needed: str
    inner: Inner = Inner()


def complaint(**values: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Outer(**values)
    return explain(caught.value)


def test_an_unknown_name_gets_its_nearest():
    assert complaint(need="x") == (
        "'need' is no field of Outer: did you mean 'needed'? allowed are inner, needed"
    )
    assert complaint(needed="x", inner={"siez": 1}).startswith("inner: 'siez' is no field of Inner")


def test_values_are_shown_without_pydantics_own_words():
    assert complaint(needed="x", inner={"size": 0}) == (
        "inner.size: should be greater than or equal to 1 (got 0)"
    )
    assert complaint() == "needed: is missing"
    assert complaint(needed=1, inner={"size": "a"}) == (
        "needed: should be a valid string (got 1); "
        "inner.size: should be a valid integer, unable to parse string as an integer (got 'a')"
    )


def test_frozen():
    with pytest.raises(ValidationError):
        Outer(needed="x").needed = "y"
