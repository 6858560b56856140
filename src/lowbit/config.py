"""What every configuration class shares: frozen, checked, and strict about names."""

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Config(BaseModel):
    """A frozen pydantic model; an unknown key is an error that names the nearest field."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_field(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(
                        unknown_name(key, cls.model_fields, f"field of {cls.__name__}")
                    )
        return values


def unknown_name(name: str, allowed: Any, what: str) -> str:
    """The sentence for a misspelt name: what came, what is near, what is allowed."""
    names = sorted(allowed)
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{name!r} is no {what}: {hint}allowed are {', '.join(names)}"


def explain(error: ValidationError) -> str:
    """What is wrong, field by field: "bits: should be less than or equal to 8 (got 9)"."""
    return "; ".join(_sentence(detail) for detail in error.errors(include_url=False))


def _sentence(detail: Any) -> str:
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    place = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "value_error":  # our own sentence, which says what it got
        return f"{place}: {message}" if place else message
    if detail["type"] == "missing":
        return f"{place}: is missing"
    return f"{place or 'the whole'}: {message} (got {detail['input']!r})"
