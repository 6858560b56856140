"""What every configuration class shares: frozen, checked, and strict about names."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from lowbit.fields import section

SHAPES_RESULT = "shapes_result"
NEAR = 0.5  # of difflib's ratio, which is 1 for equal names: "rtn" is just near to "rtn-w4a16"


class Config(BaseModel):
    """A frozen pydantic model; an unknown key is an error that names the nearest field.

    The docstring of a subclass says what the class is for; its fields are listed below that text
    from their own descriptions, so that `help` shows all of them, inherited ones too.

    about: the docstring without that list.
    """

    about: ClassVar[str]

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.about = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        cls.__doc__ = "\n\n".join(filter(None, (cls.about, section(cls.model_fields))))

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """The configuration whose fields are arguments of a function: `RunOptions.of(locals())`.

        The function spells its options out in its signature; a test compares them with the fields.
        """
        return cls(**{name: arguments[name] for name in cls.model_fields})

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


def option(default: Any, description: str, *, shapes_result: bool, **limits: Any) -> Any:
    """A field that says whether another value of it can change a single bit of the result.

    Those that can are part of a run's signature. limits: as `pydantic.Field` takes them.
    """
    extra: JsonDict = {SHAPES_RESULT: shapes_result}
    return Field(default, description=description, json_schema_extra=extra, **limits)


def shapes_result(field: FieldInfo) -> bool:
    """What `option` was told. Raises KeyError for a field that does not say."""
    extra = field.json_schema_extra
    return bool(dict(extra if isinstance(extra, dict) else {})[SHAPES_RESULT])


def unknown_name(name: str, allowed: Any, what: str) -> str:
    """The sentence for a misspelt name: what came, what is near, what is allowed."""
    names = sorted(allowed)
    near = get_close_matches(name, names, n=1, cutoff=NEAR)
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
