"""Families as tables, and a model that is streamed from its folder block by block."""

from pathlib import Path
from typing import Any

from torch import nn

from lowbit.checkpoint.reader import read_json
from lowbit.models.discovery import discover
from lowbit.models.falcon import FALCON
from lowbit.models.family import Family
from lowbit.models.llama import LLAMA
from lowbit.models.mistral import MISTRAL
from lowbit.models.mixtral import MIXTRAL
from lowbit.models.opt import OPT
from lowbit.models.qwen2 import QWEN2
from lowbit.models.qwen3 import QWEN3, QWEN3_MOE

FAMILIES = {
    architecture: family
    for family in (LLAMA, MISTRAL, MIXTRAL, OPT, QWEN2, QWEN3, QWEN3_MOE, FALCON)
    for architecture in family.architectures
}


def family_of(config: Any, model: nn.Module) -> Family:
    """The table of config.json's architecture, or what `discover` makes of the model."""
    for architecture in config.architectures or [type(model).__name__]:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    return discover(model)


def family_name(folder: Path) -> str:
    """The family that a folder's config.json names, without a model; else "discovered"."""
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") if isinstance(config, dict) else None
    for architecture in architectures if isinstance(architectures, list) else []:
        if architecture in FAMILIES:
            return FAMILIES[architecture].name
    return "discovered"
