"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v, which no fold minds."""

from dataclasses import replace

from lowbit.models.llama import LLAMA

QWEN2 = replace(LLAMA, name="qwen2", architectures=("Qwen2ForCausalLM",))
