"""Llama 1, 2 and 3; the tables of Mistral, Mixtral, Qwen2 and Qwen3 are built from this one."""

from lowbit.models.family import Family, FoldRule, Group, always

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

ATTENTION_GROUPS = (
    Group("attention.input", QKV),
    Group("attention.output", ("self_attn.o_proj",)),
)
MLP_GROUPS = (
    Group("mlp.input", ("mlp.gate_proj", "mlp.up_proj")),
    Group("mlp.output", ("mlp.down_proj",)),
)
ATTENTION_FOLDS = (
    FoldRule("norm", "input_layernorm", QKV),
    FoldRule("values", "self_attn.v_proj", ("self_attn.o_proj",)),
    FoldRule("rotary", "self_attn.q_proj", ("self_attn.k_proj",)),
)
MLP_FOLDS = (
    FoldRule("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    FoldRule("gated", "mlp.up_proj", ("mlp.down_proj",)),
)

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    blocks="model.layers",
    groups=always(*ATTENTION_GROUPS, *MLP_GROUPS),
    folds=always(*ATTENTION_FOLDS, *MLP_FOLDS),
)
