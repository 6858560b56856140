"""What llama.cpp has to know about a model, for each architecture that is exported to it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Keys = dict[str, int | float | str | bool | list[int] | list[bool]]
ROPE_FREQS = "rope_freqs.weight"
GEMMA3_LOCAL = 10000.0  # base of the rotary embedding of local layers, fixed in llama.cpp
GEMMA3_PERIOD = 6  # every sixth layer of Gemma 3 is global, fixed in llama.cpp


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    name: its name there.
    permuted: whether rows of q_proj and k_proj are stored in another order, because llama.cpp
        rotates neighbouring rows of a head and transformers rows half a head apart.
    norm_offset: number that is added to the weights of norms.
    own_head_size: whether the heads together may be wider or narrower than the hidden size.
    more: returns keys beyond the common ones. It raises ValueError for a model that llama.cpp would
        compute differently.
    """

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    own_head_size: bool = True
    more: Callable[[Mapping[str, Any]], Keys] = lambda config: {}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the part of config.json that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def head_size(config: Mapping[str, Any]) -> int:
    """Returns the number of channels of a head."""
    size = config.get("head_dim")
    return int(size or config["hidden_size"] // config["num_attention_heads"])


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the rotary embedding of all layers, or of the global ones."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    settings = settings.get("full_attention", settings)
    theta = settings.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = settings.get("rope_type") or settings.get("type") or "default"
    return {**settings, "rope_theta": float(theta), "rope_type": kind}


def common_keys(arch: Architecture, config: Mapping[str, Any]) -> Keys:
    """Returns the keys that all architectures have, with the prefix of the architecture."""
    settings, size = rope(config), head_size(config)
    if not arch.own_head_size and size * config["num_attention_heads"] != config["hidden_size"]:
        raise ValueError(
            f"its {config['num_attention_heads']} heads of {size} channels are not as wide as the "
            f"hidden size {config['hidden_size']}, which llama.cpp needs for {arch.name}"
        )
    rotated = int(size * float(config.get("partial_rotary_factor") or 1.0))
    keys: Keys = {
        "context_length": context_length(arch, config),
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads")
        or config["num_attention_heads"],
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": rotated,
        "rope.freq_base": settings["rope_theta"],
        "vocab_size": config["vocab_size"],
    }
    if settings["rope_type"] == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}
    elif settings["rope_type"] not in ("default", "llama3"):
        raise ValueError(
            f"rope_type is {settings['rope_type']!r}: for gguf, lowbit writes default, linear and "
            "llama3. Export to ct or dense, and convert that with llama.cpp's own script"
        )
    return {f"{arch.name}.{key}": value for key, value in (keys | arch.more(config)).items()}


def context_length(arch: Architecture, config: Mapping[str, Any]) -> int:
    """Returns the context, cut to a window of attention that the architecture does not know."""
    context, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    used = config.get("use_sliding_window", True) and arch.name in ("llama", "qwen2", "qwen3")
    return min(context, int(window)) if window and used else context


def rope_freqs(config: Mapping[str, Any]) -> Tensor | None:
    """Returns the factors by which Llama 3 divides frequencies: (head size / 2,); None: none.

    Source: rope_type llama3 of transformers, modeling_rope_utils.
    """
    settings = rope(config)
    if settings["rope_type"] != "llama3":
        return None
    size, factor = head_size(config), float(settings["factor"])
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    context = float(settings["original_max_position_embeddings"])
    frequency = settings["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = context * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _gemma2(config: Mapping[str, Any]) -> Keys:
    _check_query_scale(config)
    return {
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
        "attention.sliding_window": config["sliding_window"],
    }


def _gemma3(config: Mapping[str, Any]) -> Keys:
    _check_query_scale(config)
    kinds = config.get("layer_types") or []
    wanted = [
        "full_attention" if (i + 1) % GEMMA3_PERIOD == 0 else "sliding_attention"
        for i in range(len(kinds))
    ]
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    if kinds != wanted or float(local.get("rope_theta") or GEMMA3_LOCAL) != GEMMA3_LOCAL:
        raise ValueError(
            f"its layers are not {GEMMA3_PERIOD - 1} local ones (rotary base {GEMMA3_LOCAL:.0f}) "
            "before each global one, which llama.cpp takes for granted in Gemma 3"
        )
    return {"attention.sliding_window": config["sliding_window"]}


def _check_query_scale(config: Mapping[str, Any]) -> None:
    scalar, size = config.get("query_pre_attn_scalar", head_size(config)), head_size(config)
    largest = config["num_hidden_layers"] in (46, 62)  # the 27 B models, which llama.cpp knows
    if scalar != size and not largest:
        raise ValueError(
            f"query_pre_attn_scalar is {scalar}, and llama.cpp scales queries by the size of a "
            f"head, {size}"
        )


def _phi3(config: Mapping[str, Any]) -> Keys:
    window = config.get("sliding_window")
    return {"attention.sliding_window": int(window)} if window else {}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2", own_head_size=False),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", norm_offset=1.0, more=_gemma2),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, more=_gemma3),
    "phi3": Architecture("phi3", own_head_size=False, more=_phi3),
}
