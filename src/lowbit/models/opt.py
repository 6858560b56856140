"""OPT: LayerNorms, biases everywhere, learned position embeddings, ReLU between fc1 and fc2."""

from dataclasses import replace
from typing import Any

from lowbit.models.family import Family, FoldRule, Group, Heads, always, heads_of

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _heads(config: Any) -> Heads:
    """Positions are learned embeddings, so RoPE rotates no channel."""
    return replace(heads_of(config), rotary=0)


def _folds(config: Any) -> tuple[FoldRule, ...]:
    inside = (
        FoldRule("values", "self_attn.v_proj", ("self_attn.out_proj",)),
        FoldRule("rotary", "self_attn.q_proj", ("self_attn.k_proj",), heads=_heads),
    )
    if not config.do_layer_norm_before:  # OPT-350m: the residual also reads the norms' outputs
        return inside
    return (
        FoldRule("norm", "self_attn_layer_norm", QKV),
        *inside,
        FoldRule("norm", "final_layer_norm", ("fc1",)),
    )


OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    blocks="model.decoder.layers",
    groups=always(
        Group("attention.input", QKV),
        Group("attention.output", ("self_attn.out_proj",)),
        Group("mlp.input", ("fc1",)),
        Group("mlp.output", ("fc2",)),
    ),
    folds=_folds,
)
