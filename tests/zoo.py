"""Small models of every family for many tests, random or made from a trained model.

A family's line in ZOO is also its contract: which folds each of its two blocks must have, and how
many of them take a shift. A rule that silently stops to match changes these numbers.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowbit.blocks import BlockTask, Stream
from lowbit.blocks.hessian import Hessian
from lowbit.events import BlockLog, OnEvent
from lowbit.methods.result import BlockResult
from lowbit.models.source import SourceModel

MODELS = Path(__file__).parents[1] / "examples" / "models"
VOCABULARY = 101
TOKENS = 23  # more than WINDOW, and even with no block size
WINDOW = 8
WIDTHS = tuple("8765432")  # the streams of what is sliced

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GQA = SIZES | {"intermediate_size": 80, "num_key_value_heads": 2, "tie_word_embeddings": False}
OPT = SIZES | {"ffn_dim": 80, "dropout": 0.0, "word_embed_proj_dim": 32, "pad_token_id": 1}
EXPERTS = GQA | {"num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Block 0 is sparse, block 1 dense.
QWEN3_MOE = EXPERTS | {
    "head_dim": 16,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
}
FALCON = SIZES | {"alibi": False, "bias": False, "multi_query": True, "parallel_attn": True}
FALCON_RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
FALCON_40B = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}

GATED = Counter(norm=2, values=1, rotary=1, gated=1)
SPARSE = Counter(norm=2, values=1, rotary=1, gated=4)
PLAIN = Counter(norm=2, values=1, rotary=1)
PARALLEL = Counter(norm=1, values=1, rotary=1)
NORMLESS = Counter(values=1, rotary=1)


@dataclass(frozen=True)
class Line:
    """One model of the zoo, and the folds that its blocks must have."""

    model_type: str
    options: dict[str, Any]
    folds: Sequence[Counter[str]] = ()  # of block 0 and 1, by kind
    shiftable: int = 0  # how many of them, in each block
    family: str = ""  # the table that must be chosen; empty: the model type
    window: bool = False  # masks of a sliding window, in some block


ZOO: dict[str, Line] = {
    "opt": Line("opt", OPT, (PLAIN, PLAIN), shiftable=3),
    "opt, norms behind": Line(
        "opt", OPT | {"do_layer_norm_before": False}, (NORMLESS, NORMLESS), shiftable=1
    ),
    "opt, no biases": Line(
        "opt",
        OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False},
        (NORMLESS, NORMLESS),
    ),
    "llama": Line("llama", GQA, (GATED, GATED)),
    "llama, tied, biased": Line(
        "llama", GQA | {"tie_word_embeddings": True, "attention_bias": True}, (GATED, GATED), 1
    ),
    "llama 3": Line("llama", GQA | {"rope_parameters": LLAMA3}, (GATED, GATED)),
    "mistral": Line("mistral", GQA | {"sliding_window": WINDOW}, (GATED, GATED), window=True),
    "qwen2": Line(
        "qwen2",
        GQA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        (GATED, GATED),
        window=True,
    ),
    "qwen3": Line("qwen3", GQA | {"head_dim": 16}, (GATED, GATED)),
    "qwen3_moe": Line("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True}, (SPARSE, GATED)),
    "qwen3_moe, raw weights": Line(
        "qwen3_moe", QWEN3_MOE | {"norm_topk_prob": False}, (SPARSE, GATED)
    ),
    "falcon 7b": Line("falcon", FALCON, (PARALLEL, PARALLEL)),
    "falcon 40b": Line("falcon", FALCON_40B, (PLAIN, PLAIN)),
    "falcon 11b": Line("falcon", FALCON_40B | {"num_ln_in_parallel_attn": 1}, (PARALLEL, PARALLEL)),
    "falcon rw": Line("falcon", FALCON | FALCON_RW, (PLAIN, PLAIN), shiftable=3),
    "mixtral": Line(
        "mixtral",
        EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW},
        (SPARSE, SPARSE),
        window=True,
    ),
}
# Architectures without a table, whose groups are discovered from the structure of the model.
DISCOVERED: dict[str, Line] = {
    "gemma2": Line("gemma2", GQA | {"head_dim": 16, "sliding_window": WINDOW}, window=True),
    "phi3": Line("phi3", GQA | {"pad_token_id": 0, "sliding_window": None}),
    "gpt_neox": Line("gpt_neox", SIZES | {"intermediate_size": 80}),
    "qwen2_moe": Line(
        "qwen2_moe",
        EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "olmoe": Line("olmoe", EXPERTS | {"num_experts": 4}),
    "hunyuan_v1_moe": Line(
        "hunyuan_v1_moe", EXPERTS | {"num_experts": 4, "moe_topk": 2, "head_dim": 12}
    ),
    "gpt2": Line("gpt2", SIZES),
}


def make(line: Line, seed: int = 0) -> PreTrainedModel:
    """A float32 model whose parameters are all random, those of norms and biases too."""
    config = AutoConfig.for_model(line.model_type, **line.options)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=draw)
        if parameter.dim() == 1:
            bias = name.endswith("bias")
            parameter.copy_(random * 0.2 if bias else 1 + random.clamp(-2, 2) * 0.3)
        else:  # outputs of the size of the inputs, so that no part is drowned by another
            embeds = "embed" in name or "wte" in name or "wpe" in name
            parameter.copy_(random * (0.7 if embeds else 1.3 * parameter.shape[-1] ** -0.5))
    return model


def write(
    line: Line,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> Path:
    """Saves the model to a folder with transformers."""
    make(line, seed).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


_KEPT = TemporaryDirectory(prefix="lowbit-zoo-", ignore_cleanup_errors=True)


@cache
def folder(name: str) -> Path:
    """A model of ZOO or DISCOVERED on disk, for tests that only read it."""
    return write((ZOO | DISCOVERED)[name], Path(_KEPT.name) / name)


@cache
def source(name: str) -> SourceModel:
    return SourceModel(folder(name))


def tokens(seed: int = 0, rows: int = 2, length: int = TOKENS) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=draw)


def task(
    name: str, block: int = 0, batches: int = 3, length: int = TOKENS, noise: float = 0.02
) -> BlockTask:
    """The task of a method; its quantized streams are the float stream with noise."""
    model = source(name)
    first = model.first_stream([tokens(i, length=length) for i in range(batches)])
    block_name = model.block_names[block]
    draw = torch.Generator().manual_seed(7)
    noisy = [h + noise * torch.randn(h.shape, generator=draw) * h.std() for h in first.hidden()]
    quantized = Stream(noisy, first.arguments.copy(), block=block)
    made = BlockTask(
        name=block_name,
        block=model.load_block(block_name),
        groups=model.groups(block_name),
        folds=model.folds(block_name),
        streams={"float": Stream(first.hidden(), first.arguments, block=block)}
        | dict.fromkeys(("quantized", *WIDTHS), quantized),
        seed=0,
        log=log(),
        attentions=model.attentions(block_name),
    )
    made.output_hessians = OutputHessians(made, uneven)
    return made


class OutputHessians(Mapping[str, Hessian]):
    """The Hessians of the outputs of a task's linears, made by a function of their rows."""

    def __init__(self, task: BlockTask, make: Callable[[int], Tensor], tokens: int = 1000) -> None:
        self.task, self.make, self.tokens = task, make, tokens

    def __getitem__(self, name: str) -> Hessian:
        rows = len(self.task.block.get_parameter(f"{name}.weight"))
        return Hessian(self.make(rows), self.tokens)

    def __iter__(self) -> Iterator[str]:
        return (name for group in self.task.groups for name in group.linears)

    def __len__(self) -> int:
        return len(list(iter(self)))


def uneven(rows: int) -> Tensor:
    """A Hessian of outputs some of which matter ten times as much as others."""
    draw = torch.Generator().manual_seed(rows)
    mixed = torch.eye(rows) + 0.1 * torch.randn(rows, rows, generator=draw)
    return mixed @ torch.linspace(1, 10, rows).diag() @ mixed.T


def log(emit: OnEvent = lambda event: None) -> BlockLog:
    """A log of the block that `task` makes."""
    return BlockLog(emit=emit, block="model.layers.0", index=0, of=2)


def fallbacks(result: BlockResult) -> dict[str, str]:
    """The report of every linear with a fallback, by name."""
    found = result.report.linears.items()
    return {name: linear.fallback for name, linear in found if linear.fallback is not None}


def streamed_logits(model: SourceModel, whole: PreTrainedModel, batch: Tensor) -> Tensor:
    """Logits with the blocks of `model`, run one by one, and all other parts of `whole`."""
    (hidden,) = model.run([batch]).hidden()
    blocks = whole.get_submodule(model.family.blocks)
    hooks = [block.register_forward_hook(_instead(hidden)) for block in blocks.children()]
    logits = whole(batch).logits
    for hook in hooks:
        hook.remove()
    return logits


def _instead(hidden: Tensor) -> Callable[..., Any]:
    return lambda module, args, out: (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, over all entries together."""
    return float((found - wanted).detach().norm() / wanted.detach().norm())


# The trained Llama as other families, function for function.


def rewrite(family: str, target: Path, experts: int = 4, noise: float = 0.01) -> Path:
    """examples/models/llama-mini as "mistral", "qwen2" or "mixtral", in a folder of its own.

    Mistral and Qwen2 (with biases of zero) compute the same logits. Mixtral's experts are copies
    of the MLP, told apart by `noise` (relative to each matrix's spread), under a random router.
    """
    trained = MODELS / "llama-mini"
    tensors = load_file(trained / "model.safetensors")
    config = json.loads((trained / "config.json").read_text()) | {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "sliding_window": None,
    }
    if family == "qwen2":
        tensors |= {
            name.replace(".weight", ".bias"): torch.zeros(len(tensor), dtype=tensor.dtype)
            for name, tensor in tensors.items()
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        }
    if family == "mixtral":
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
        tensors = _as_mixtral(tensors, experts, noise)
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for path in trained.iterdir():
        if not (target / path.name).exists():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def _as_mixtral(tensors: dict[str, Tensor], experts: int, noise: float) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, inside, matrix = name.partition(".mlp.")
        if not inside:
            made[name] = tensor
            continue
        moe = f"{block}.block_sparse_moe"
        part = parts[matrix.removesuffix(".weight")]
        if part == "w1":
            router = torch.randn(experts, tensor.shape[1], generator=draw)
            made[f"{moe}.gate.weight"] = (router * 0.1).to(tensor.dtype)
        for number in range(experts):
            change = torch.randn(tensor.shape, generator=draw) * noise * tensor.float().std()
            made[f"{moe}.experts.{number}.{part}.weight"] = (tensor.float() + change).to(
                tensor.dtype
            )
    return made


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter from a normal distribution, without the global random generator."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return module.requires_grad_(False)
