"""Small random models that read images and text, of every family that the tests know."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import zoo
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": zoo.VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# SigLIP, CLIP, Pixtral.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
QWEN_TOKENS = {
    "image_token_id": 97,
    "video_token_id": 98,
    "vision_start_token_id": 99,
    "vision_end_token_id": 100,
}
QWEN3_VISION = QWEN_VISION | {
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# The options of a family's config; those of the language model and of the vision tower are inside.
IMAGE_TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT
        | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 97,
        "boi_token_index": 98,
        "eoi_token_index": 99,
    },
    "gemma4": {
        "text_config": TEXT
        | {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": zoo.VOCABULARY,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 14,
        },
        "audio_config": None,
        "image_token_id": 97,
        "audio_token_id": 98,
        "video_token_id": 96,
        "boi_token_id": 95,
        "eoi_token_id": 94,
    },
    "qwen2_vl": {
        "text_config": TEXT
        | {"head_dim": 12, "rope_parameters": MROPE | {"mrope_section": [2, 2, 2]}},
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 48,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": TEXT
        | {"head_dim": 12, "rope_parameters": MROPE | {"mrope_section": [2, 2, 2]}},
        "vision_config": QWEN_VISION
        | {"out_hidden_size": 48, "window_size": 56, "fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": QWEN3_VISION,
        **QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": TEXT | MOE | {"rope_parameters": MROPE, "mlp_only_layers": [1]},
        "vision_config": QWEN3_VISION,
        **QWEN_TOKENS,
    },
    "qwen3_5": {
        "text_config": TEXT | LINEAR,
        "vision_config": QWEN3_VISION,
        **QWEN_TOKENS,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": 97,
        "vision_feature_layer": -1,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": 97,
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "smolvlm_vision"},
        "image_token_id": 97,
        "scale_factor": 2,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [28, 28],
            "patch_size": [14, 14],
        },
        "image_token_id": 97,
    },
    "llama4": {
        "text_config": TEXT
        | {
            "intermediate_size_mlp": 80,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
        "vision_config": VISION
        | {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "intermediate_size": 128,
        },
        "image_token_index": 97,
        "boi_token_index": 98,
        "eoi_token_index": 99,
    },
}

_KEPT = TemporaryDirectory(prefix="lowbit-image-text-", ignore_cleanup_errors=True)


def make(name: str) -> PreTrainedModel:
    """A float32 model whose parameters are all random."""
    config = AutoConfig.for_model(name, **IMAGE_TEXT[name])
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for path, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=draw)
        if parameter.dim() == 1:
            bias = path.endswith("bias")
            parameter.copy_(random * 0.2 if bias else 1 + random.clamp(-2, 2) * 0.3)
        else:
            parameter.copy_(random * (0.7 if "embed" in path else parameter.shape[-1] ** -0.5))
    return model


@cache
def folder(name: str) -> Path:
    """A model on disk, with the file of a processor, for tests that only read it."""
    return make_folder(name, Path(_KEPT.name) / name)


def make_folder(name: str, path: Path) -> Path:
    make(name).save_pretrained(path)
    (path / "preprocessor_config.json").write_text("{}")
    return path
