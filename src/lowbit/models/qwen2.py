"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, to which the same folds apply."""

from dataclasses import replace

from lowbit.models.llama import LLAMA

QWEN2 = replace(LLAMA, name="qwen2", architectures=("Qwen2ForCausalLM",))
