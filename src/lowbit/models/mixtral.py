"""Mixtral: Mistral's attention, a router, and eight experts w2(silu(w1(x)) * w3(x))."""

from lowbit.models.family import Family, FoldRule, Group, always
from lowbit.models.llama import ATTENTION_FOLDS, ATTENTION_GROUPS

EXPERTS_INPUT = ("mlp.experts.*.w1", "mlp.experts.*.w3")

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    blocks="model.layers",
    groups=always(
        *ATTENTION_GROUPS,
        Group("mlp.experts.*.input", EXPERTS_INPUT),
        Group("mlp.experts.*.output", ("mlp.experts.*.w2",)),
    ),
    folds=always(
        *ATTENTION_FOLDS,
        FoldRule("norm", "post_attention_layernorm", ("mlp.gate", *EXPERTS_INPUT)),
        FoldRule("gated", "mlp.experts.*.w3", ("mlp.experts.*.w2",)),
    ),
    skip=("mlp.gate",),
)
