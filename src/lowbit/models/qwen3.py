"""Qwen3 and Qwen3-MoE: Llama with norms after q_proj and k_proj; the rotary fold scales these."""

from lowbit.models.family import Family, FoldRule, Group, always
from lowbit.models.llama import ATTENTION_GROUPS, MLP_FOLDS, MLP_GROUPS, QKV

ATTENTION_FOLDS = (
    FoldRule("norm", "input_layernorm", QKV),
    FoldRule("values", "self_attn.v_proj", ("self_attn.o_proj",)),
    FoldRule("rotary", "self_attn.q_norm", ("self_attn.k_norm",)),
)
EXPERTS_INPUT = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    blocks="model.layers",
    groups=always(*ATTENTION_GROUPS, *MLP_GROUPS),
    folds=always(*ATTENTION_FOLDS, *MLP_FOLDS),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    blocks="model.layers",
    groups=always(
        *ATTENTION_GROUPS,
        *MLP_GROUPS,  # the dense blocks
        Group("mlp.experts.*.input", EXPERTS_INPUT),
        Group("mlp.experts.*.output", ("mlp.experts.*.down_proj",)),
    ),
    folds=always(
        *ATTENTION_FOLDS,
        *MLP_FOLDS,
        FoldRule("norm", "post_attention_layernorm", ("mlp.gate", *EXPERTS_INPUT)),
        FoldRule("gated", "mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    skip=("mlp.gate",),
)
