"""Mistral: same as Llama. The sliding window of some versions changes masks, not weights."""

from dataclasses import replace

from lowbit.models.llama import LLAMA

MISTRAL = replace(LLAMA, name="mistral", architectures=("MistralForCausalLM",))
