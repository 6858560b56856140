"""Mistral: Llama, with a sliding window in some versions (a matter of masks, not of weights)."""

from dataclasses import replace

from lowbit.models.llama import LLAMA

MISTRAL = replace(LLAMA, name="mistral", architectures=("MistralForCausalLM",))
