"""One small random model of every causal language model in transformers, and what is checked on it.

`small` shrinks the default configuration of a model type: every field that SIZES names gets its
value, and lists with one entry per layer are cut to LAYERS entries that show each kind of layer.
OPTIONS holds what one model type needs besides.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lowbit
from lowbit.blocks.capture import call_block
from lowbit.blocks.folding import apply_folds, load_changed, tensors_of
from lowbit.blocks.walk import Step
from lowbit.load import load_model
from lowbit.methods import RTN
from lowbit.models.generation import greedy
from lowbit.models.source import SourceModel

LAYERS = 4
VOCABULARY = 101
TOKENS = 23  # more than WINDOW, and even with no block size
WINDOW = 8
TOLERANCE = 1e-4  # relative, of streamed logits

# Model types in the mapping that are no decoder-only language models: encoders that can be run as
# decoders, halves of encoder-decoders, and models of text with images or sound.
ENCODERS = """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
    roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
    reformer
    """.split()
HALVES = """
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet
    trocr whisper
    """.split()
WITH_IMAGES_OR_SOUND = """
    dots3_note dots3_note_text emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified
    gemma4_unified_assistant git got_ocr2 inkling2_text inkling_text llama4 minimax_m3_vl_text
    mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5
    qwen3_5_moe qwen4_exp
    """.split()
# These have the architecture of another model type in the list, or none of their own.
TWINS = {
    "gpt-sw3": "gpt2",
}

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": WINDOW,
    "global_head_dim": 16,
    "state_size": 8,
    "time_step_rank": 8,
    "conv_kernel": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 128,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "n_head": 4,
    "n_heads": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "d_model": 64,
    "dff": 96,
    "dim_ff": 96,
    "dim_head": 16,
    "ffn_dim": 96,
    "rotary_dim": 8,
    "attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_groups": 2},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{
            f"{part}_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 16,
                **({"hidden_size_global": 64} if part in ("encoder", "decoder") else {}),
            }
            for part in ("patcher", "encoder", "decoder", "global")
        },
    },
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_top_k": 2},
    },
    "deepseek_v4": {"o_lora_rank": 16},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "intermediate_size": [96] * LAYERS,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": WINDOW},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_groups": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"ffn_hidden_size": 96, "zero_expert_num": 2, "expert_ffn_hidden_size": 32}
    | {"head_dim": 8, "qk_head_dim": 24, "num_layers": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2, "chunk_size": 8},
    "mpt": {"max_seq_len": 128},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 48,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [],
    },
    # transformers sets the embedding of the padding token to zero when it loads the model.
    "youtu": {"pad_token_id": None},
    "zamba2": {"adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}


# What does not work, and a part of "STEP: REASON".
NOT_WORKING: dict[str, str] = {
    "hrm_text": "a recurrence over depth",
}
# One model of each kind of structure.
KINDS = {
    "hybrid": "qwen3_next",
    "groups per block": "gemma4_text",
    "stacked experts": "gpt_oss",
    "experts without gate": "nemotron_h",
    "sorted experts": "llama4_text",
    "experts named as on disk": "mixtral",
    "conversions": "kimi_linear",
    "convolution": "lfm2_moe",
    "recurrent": "olmo_hybrid",
    "Conv1D": "gpt2",
    "latent attention": "deepseek_v3",
}


def causal_types() -> list[str]:
    """The model types of decoder-only language models, each architecture once."""
    left_out = {*ENCODERS, *HALVES, *WITH_IMAGES_OR_SOUND, *TWINS}
    seen: set[Any] = set()
    chosen = []
    for name, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name not in left_out and architecture not in seen:
            seen.add(architecture)
            chosen.append(name)
    return sorted(chosen)


def small(model_type: str, **more: Any) -> Any:
    """The config of a small model of a type. more: fields that differ from those of the tables"""
    default = AutoConfig.for_model(model_type)
    fields = default.to_dict()
    layers = fields.get("num_hidden_layers") or 0
    options = {key: value for key, value in SIZES.items() if key in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        options["num_key_value_heads"] = SIZES["num_attention_heads"]
        if "head_dim" in fields:
            options["head_dim"] = SIZES["qk_rope_head_dim"]
    for key, value in fields.items():
        if isinstance(value, list) and len(value) == layers and layers > LAYERS:
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else value
            options[key] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    options |= OPTIONS.get(model_type, {}) | more
    options = {key: value for key, value in options.items() if value is not ...}
    return AutoConfig.for_model(model_type, **options)


def make(model_type: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A float32 model whose parameters are all random, those of norms and biases too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(small(model_type, **more), dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings()
    for name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=draw)
        module = model.get_submodule(name.rpartition(".")[0])
        if module is embedding:
            parameter.copy_(random * 0.7)
        elif isinstance(module, nn.Linear) and parameter.dim() == 2:
            parameter.copy_(random * 1.3 * parameter.shape[-1] ** -0.5)
        elif parameter.dim() >= 2 and 0 < parameter.std() < 0.1:
            parameter.mul_(0.17 / parameter.std())
        else:
            parameter.add_(random * 0.2)
    return model


@dataclass(frozen=True)
class Outcome:
    """What came of a model: `works`, or the reason why it does not.

    step: the step that failed; empty if all went well.
    """

    step: str = ""
    reason: str = ""
    refused: bool = False

    @property
    def works(self) -> bool:
        return not self.step


def outcome(model_type: str, folder: Path) -> Outcome:
    """Runs every check on a small model. A ValueError before the first block is a refusal."""
    step = "build"
    try:
        for begun in check(model_type, folder):
            step = begun
    except AssertionError as error:
        return Outcome(step, f"AssertionError: {error}")
    except ValueError as error:
        return Outcome(step, str(error), refused=step in ("read", "quantize at 8 bits"))
    except Exception as error:  # any error of the model's own code is an outcome
        return Outcome(step, f"{type(error).__name__}: {error}")
    return Outcome()


def check(model_type: str, folder: Path) -> Iterator[str]:
    """Runs the checks one after another; yields the name of each before it begins."""
    yield "build"
    model = make(model_type)
    batches = [tokens(seed) for seed in (1, 2)]
    yield "save"
    model.save_pretrained(folder / "float")
    whole = AutoModelForCausalLM.from_pretrained(folder / "float", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = [whole(input_ids=batch, use_cache=False).logits for batch in batches]
    assert all(logits.isfinite().all() for logits in wanted), "the float model is not finite"
    yield "read"
    source = SourceModel(folder / "float")
    yield "stream"
    hidden = source.run(batches).hidden()
    outside = source.without_blocks()
    for batch, last, logits in zip(batches, hidden, wanted, strict=True):
        difference = error(outside.logits(batch, last), logits)
        assert difference < TOLERANCE, f"streamed logits differ by {difference:.1e}"
    yield "fold"
    assert folded_error(source, batches) < 1e-5, "a fold changes the output of a block"
    errors = {}
    for bits in (8, 4):
        yield f"quantize at {bits} bits"
        out = lowbit.quantize(
            folder / "float",
            folder / f"{bits}",
            RTN(bits=bits, group_size=16),
            device="cpu",
            without_tokenizer=True,
            self_check=bits == 8,  # it is the same for both
        )
        yield f"load at {bits} bits"
        quantized = load_model(out)
        plain = AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            found = [quantized(input_ids=batch, use_cache=False).logits for batch in batches]
            again = [plain(input_ids=batch, use_cache=False).logits for batch in batches]
        assert all(map(torch.equal, found, again)), "from_pretrained gives other logits"
        errors[bits] = max(map(error, found, wanted))
    yield "compare 8 and 4 bits"
    assert 0 < errors[8] < errors[4], f"errors at 8 and 4 bits: {errors}"
    yield "generate"
    assert len(greedy(quantized, [5, 6, 7, 8, 9], 8)) == 8


def folded_error(source: SourceModel, batches: list[Tensor]) -> float:
    """The largest relative error of a block all of whose folds have random scales and signs."""
    stream, errors = source.first_stream(batches), [0.0]
    draw = torch.Generator().manual_seed(0)

    def visit(step: Step) -> None:
        folds = {fold.name: fold for fold in source.folds(step.name)}
        scales = {
            name: (0.5 + torch.rand(fold.size, generator=draw))
            * (torch.randint(2, (fold.size,), generator=draw) * 2 - 1)
            for name, fold in folds.items()
            if fold.kind != "rotary"
        }
        folded = deepcopy(step.block)
        load_changed(folded, apply_folds(tensors_of(step.block), folds, scales))
        with torch.no_grad():
            for one, other in zip(stream, stream, strict=True):
                wanted = call_block(step.block, one)
                errors.append(error(call_block(folded, other), wanted))
        step.advance()

    source.walk({"hidden": stream}, visit)
    return max(errors)


def tokens(seed: int, rows: int = 1, length: int = TOKENS) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=draw)


def error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, over all entries together."""
    return float((found - wanted).norm() / wanted.norm())
