"""Makes mlc-chat-config.json, which describes model, tokenizer and conversation to MLC-LLM."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint.quantized_folder import QuantizedFolder
from lowbit.checkpoint.reader import read_json
from lowbit.exporters.mlc.names import Architecture

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)
CHUNK = 8192  # tokens that MLC reads at once at most
OFF = -1  # of a window or a sink that is not used
SAMPLING = ("temperature", "top_p", "repetition_penalty")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def chat_config(
    folder: QuantizedFolder, architecture: Architecture, quantization: str
) -> dict[str, Any]:
    """Returns the content of mlc-chat-config.json.

    Raises ValueError for a model that MLC would compute differently, and for one without tokenizer.
    """
    config = folder.config
    if not (folder.folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder.folder} has no tokenizer.json, which MLC reads. Save the tokenizer with "
            "transformers: AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    model = _model_config(folder, architecture)
    generation = _generation(folder.folder)
    ids = {key: generation.get(key, config.get(key)) for key in IDS}
    sampling = {key: generation[key] for key in SAMPLING if generation.get(key) is not None}
    return {
        "version": "0.1.0",
        "model_type": architecture.name,
        "quantization": quantization,
        "model_config": model,
        "vocab_size": config["vocab_size"],
        "context_window_size": model["context_window_size"],
        "sliding_window_size": OFF,
        "prefill_chunk_size": model["prefill_chunk_size"],
        "attention_sink_size": OFF,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        **sampling,
        "tokenizer_files": [n for n in TOKENIZER_FILES if (folder.folder / n).is_file()],
        "tokenizer_info": _tokenizer_info(read_json(folder.folder / "tokenizer.json")),
        "conv_template": _plain_template(ids),
        **{key: value for key, value in ids.items() if value is not None},
    }


def context_length(folder: QuantizedFolder) -> int:
    """Returns the number of tokens that can be read, cut to the window of the attention."""
    config = folder.config
    window, context = config.get("sliding_window"), int(config["max_position_embeddings"])
    used = config.get("use_sliding_window", True)
    return min(context, int(window)) if window and used else context


def _model_config(folder: QuantizedFolder, architecture: Architecture) -> dict[str, Any]:
    config, name = folder.config, architecture.name
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or hidden // heads
    tied = bool(config.get("tie_word_embeddings"))
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}, and MLC's {name} computes silu")
    if hidden % heads or (name == "qwen2" and size * heads != hidden):
        raise ValueError(
            f"its {heads} heads of {size} channels do not divide the hidden size {hidden}, as "
            f"MLC's {name} demands"
        )
    if tied and not architecture.tied:
        raise ValueError(f"its output layer is its embedding, and MLC's {name} has two matrices")
    context = context_length(folder)
    common = {
        "hidden_size": hidden,
        "intermediate_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "num_hidden_layers": config["num_hidden_layers"],
        "head_dim": size,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "vocab_size": config["vocab_size"],
        "context_window_size": context,
        "prefill_chunk_size": min(context, CHUNK),
        "tensor_parallel_shards": 1,
        "max_batch_size": 1,
    }
    return common | dict(_own(config, architecture, tied))


def _own(
    config: Mapping[str, Any], architecture: Architecture, tied: bool
) -> Iterator[tuple[str, Any]]:
    """Yields the settings that not all architectures of MLC have."""
    theta, scaling = _rope(config, architecture)
    if architecture.tied:
        yield "tie_word_embeddings", tied
    if architecture.name in ("llama", "mistral"):
        yield "position_embedding_base", theta
    else:
        yield from {"rope_theta": theta, "hidden_act": "silu", "dtype": "float32"}.items()
    if architecture.name == "llama":
        yield from {"rope_scaling": scaling, "pipeline_parallel_stages": 1}.items()
    if architecture.name == "mistral":
        yield from {"sliding_window_size": OFF, "attention_sink_size": 0}.items()
    if architecture.name == "qwen3":
        yield "attention_bias", bool(config.get("attention_bias"))


def _rope(
    config: Mapping[str, Any], architecture: Architecture
) -> tuple[int | float, dict[str, Any] | None]:
    """Returns base and scaling of the rotary embedding; MLC looks for them in few places only."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = settings.get("rope_theta") or config.get("rope_theta") or 10000
    theta = int(theta) if theta == int(theta) else theta
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3" or not architecture.scaled:
        raise ValueError(
            f"rope_type is {kind!r}, and MLC's {architecture.name} knows "
            f"{'default and llama3' if architecture.scaled else 'default'} only: export to ct or "
            "mlx"
        )
    return theta, {key: value for key, value in settings.items() if key != "rope_theta"}


def _generation(folder: Path) -> Mapping[str, Any]:
    path = folder / "generation_config.json"
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _tokenizer_info(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Describes how tokens become text. tokenizer: the content of tokenizer.json"""
    decoders = {part.get("type") for part in _parts(tokenizer.get("decoder"), "decoders")}
    normalizers = {part.get("type") for part in _parts(tokenizer.get("normalizer"), "normalizers")}
    method = "byte_fallback" if "ByteFallback" in decoders else "byte_level"
    return {
        "token_postproc_method": method,
        "prepend_space_in_encode": "Prepend" in normalizers,
        "strip_space_in_decode": "Strip" in decoders,
    }


def _parts(section: Any, key: str) -> list[Mapping[str, Any]]:
    """Returns the parts of a sequence in tokenizer.json, or the only part."""
    if not isinstance(section, dict):
        return []
    parts = section.get(key, [section])
    return [part for part in parts if isinstance(part, dict)]


def _plain_template(ids: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a conversation template that adds nothing to a text."""
    end = ids["eos_token_id"]
    return {
        "name": "LM",
        "system_template": "{system_message}",
        "system_message": "",
        "system_prefix_token_ids": None if ids["bos_token_id"] is None else [ids["bos_token_id"]],
        "add_role_after_system_message": False,
        "roles": {"user": "", "assistant": ""},
        "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}"},
        "messages": [],
        "seps": [""],
        "role_content_sep": "",
        "role_empty_sep": "",
        "stop_str": [],
        "stop_token_ids": end if isinstance(end, list) else [] if end is None else [end],
    }
