"""A prompt is continued by models whose forward has no past_key_values."""

import pytest
import torch
import zoo
from remote_code.modeling_tiny import TinyConfig, TinyForCausalLM
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from lowbit.models.generation import _continue

MAMBA = Mamba2Config(
    **{"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    **{"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
)
MODELS = {"its own code": (TinyForCausalLM, TinyConfig()), "mamba2": (Mamba2ForCausalLM, MAMBA)}


@pytest.mark.parametrize("name", MODELS)
def test_each_token_is_the_most_probable_one(name: str) -> None:
    build, config = MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = build(config).eval()
    prompt = zoo.tokens(rows=1, length=5)[0].tolist()
    found = list(_continue(model, prompt, 6, 0.0, torch.Generator()))
    ids = list(prompt)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == ids[5:]
