"""Families as tables, and a model that is streamed from its folder block by block."""

from typing import Any

from torch import nn

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
