"""Recipes: named settings for `--recipe`, one YAML file each.

A recipe holds a method with its fields, the calibration text, fields that differ for some model
families, and the bits of the tables outside the blocks.
"""

import os
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from lowbit.config import Config, explain, unknown_name
from lowbit.parsing import decode, parse_yaml

SUFFIX = ".yaml"


class RecipeCalibration(Config):
    """The calibration text of a recipe; a field that is None has the default of `Calibration`."""

    sources: tuple[str, ...] | None = Field(
        None, min_length=1, description="Names of data sets or text files; None: wikitext2."
    )
    samples: int | None = Field(None, ge=1, description="Windows of text in all; None: 128.")
    seqlen: int | None = Field(
        None,
        ge=2,
        description="Tokens in a window; None: 2,048, or the model's context if that is shorter.",
    )


class RecipeOptions(Config):
    """Options of the run that a recipe sets; the same options of a command replace them."""

    lm_head_bits: int | None = Field(
        None, ge=2, le=8, description="Bits of the output layer; None: it stays in float."
    )
    embedding_bits: Literal[4, 6, 8] | None = Field(
        None, description="Bits of the table of token embeddings; None: it stays in float."
    )


class Recipe(Config):
    """A method with its fields, and the calibration text that goes with them."""

    description: str = Field(
        min_length=1, pattern=r"^[^\n]+$", description="What it is for, in one line."
    )
    method: str = Field(description="Name of the method; `lowbit methods` lists them.")
    fields: dict[str, Any] = Field(
        {}, description="Fields of the method that differ from its defaults."
    )
    calibration: RecipeCalibration = Field(
        RecipeCalibration(), description="The text that the method learns from."
    )
    families: dict[str, dict[str, Any]] = Field(
        {}, description="Fields that differ for a family of models, by the family's name."
    )
    options: RecipeOptions = Field(
        RecipeOptions(), description="Options of the run that go with the method."
    )
    lora: dict[str, Any] | None = Field(
        None,
        description="Fields of `LoRA`, which make it a recipe for `lowbit preprocess`; None: it is "
        "one for `lowbit quantize`.",
    )

    def settings(self, family: str) -> dict[str, Any]:
        """Returns the fields of the method for a model family."""
        return self.fields | self.families.get(family, {})


def recipe_names() -> list[str]:
    """Returns the names of all recipes that come with lowbit."""
    return sorted(_packaged())


def load_recipe(name: str) -> Recipe:
    """Reads a recipe.

    name: the name of a recipe that comes with lowbit, or the path of a file that ends in .yaml.

    Raises ValueError for an unknown name, with the most similar one, and for a file that is missing
    or is not a valid recipe.
    """
    packaged = _packaged()
    if name in packaged:
        return _read(packaged[name], name)
    if not name.endswith(SUFFIX) and os.path.exists(name):
        kind = "a folder" if os.path.isdir(name) else f"a file that does not end in {SUFFIX}"
        raise ValueError(
            f"the recipe {name} is {kind}: allowed are the names that `lowbit recipes` lists, and "
            f"{SUFFIX} files"
        )
    if not name.endswith(SUFFIX):
        unknown = unknown_name(name, packaged, "recipe", listed_by="lowbit recipes")
        raise ValueError(f"{unknown}; allowed are these and {SUFFIX} files")
    path = Path(name)
    if not os.path.isfile(path):  # also False for a name that no file can have
        raise ValueError(
            f"there is no recipe file {name}; `lowbit recipes` lists the recipes of lowbit"
        )
    return _read(path, name)


def _packaged() -> dict[str, Traversable]:
    folder = resources.files(__name__)
    files = (file for file in folder.iterdir() if file.name.endswith(SUFFIX))
    return {file.name.removesuffix(SUFFIX): file for file in files}


def _read(file: Traversable, name: str) -> Recipe:
    value = parse_yaml(decode(file.read_bytes(), f"recipe {name}"), f"recipe {name}")
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"recipe {name}: {explain(error)}") from None
