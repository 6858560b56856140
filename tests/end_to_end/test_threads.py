"""The bytes of a run do not depend on the number of threads, for any method."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit.checkpoint import file_sha256
from lowbit.kernels import products
from lowbit.methods import GPTQ, PTQ161, RTN, MatQuant, MixedQuant, OmniQuant, QuIP, Trellis

pytestmark = pytest.mark.slow

FEW = {"epochs": 1, "min_tokens": 8}
METHODS = {
    "rtn": RTN(bits=3, group_size=32),
    "gptq": GPTQ(bits=3, group_size=32),
    "omniquant": OmniQuant(bits=3, group_size=32, let=True, **FEW),
    "omniquant, gptq": OmniQuant(bits=3, group_size=32, rounding="gptq", init="awq", **FEW),
    "omniquant, w4a4": OmniQuant(bits=4, group_size=32, activation_bits=4, **FEW),
    "matquant": MatQuant(group_size=32, **FEW),
    "mixedquant": MixedQuant(bits=3, group_size=32, rounding="gptq"),
    "ptq161": PTQ161(**FEW, init="als"),
    "quip": QuIP(codebook="HI"),
    "trellis": Trellis(rate=1.5, state_bits=9),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Llama whose operations are large enough that torch divides them among threads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=416,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# Torch alone takes a minute for trellis codes.
SLOWEST = {"trellis": pytest.mark.exhaustive}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOWEST.get(n, ())) for n in METHODS])
def test_bytes_do_not_depend_on_the_number_of_threads(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "PIECE", 1 << 21)  # so that these products are cut
    tokens = torch.randint(101, (2, 128), generator=torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        out = tmp_path / str(threads)
        torch.set_num_threads(threads)
        try:
            lowbit.quantize(model, out, METHODS[name], tokens, without_tokenizer=True)
        finally:
            torch.set_num_threads(before)
        found.append({path.name: file_sha256(path) for path in out.glob("*.safetensors")})
    assert found[0] and found[0] == found[1] == found[2]
