"""Chooses the class of transformers that builds a model: text alone, or images and text."""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


def auto_class(config: Any) -> Any:
    """Returns the Auto class that builds the model which `architectures` in config.json names.

    Some configs fit two classes: the whole model, which reads images too, and its language model
    alone (Gemma 3, Qwen3.5, Llama 4). A folder of the whole model is built as the whole model.

    config: a config of transformers.
    """
    remote = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in remote:
        return AutoModelForCausalLM
    if "AutoModelForImageTextToText" in remote:
        return AutoModelForImageTextToText
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    text_alone = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = getattr(config, "architectures", None) or []
    if whole is not None and (text_alone is None or whole in named):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def language_model(model: Any) -> str:
    """Returns the path of the part of a model that reads text; "" if that is the whole model."""
    decoder = model.get_decoder()
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        return ""  # ModernBERT calls its output layer the decoder
    return next((name for name, module in model.named_modules() if module is decoder), "")
