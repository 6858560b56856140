"""lm_head_bits: tied and untied, in every family."""

import json
from pathlib import Path

import pytest
import quantized
import torch
import zoo
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.formats.uniform import UniformLinear

pytestmark = pytest.mark.slow

NAMES = ["llama", "llama, tied, biased", "opt", "falcon 40b", "mixtral", "gpt_neox"]


@pytest.mark.parametrize("name", NAMES)
def test_the_output_layer_is_packed_and_loads(tmp_path: Path, name: str) -> None:
    source = quantized.source(name)
    out = quantized.quantize(source, tmp_path / "out", lm_head_bits=8)
    plain = quantized.folder(name)
    assert len(QuantizedFolder(out).entries) == len(QuantizedFolder(plain).entries) + 1
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model, _ = lowbit.load(out)
    head = model.get_output_embeddings()
    assert isinstance(head, UniformLinear) and head.spec.bits == 8
    wanted = AutoModelForCausalLM.from_pretrained(source).get_output_embeddings().weight
    assert ((head.dequantize() - wanted).abs() <= head.scale.float()).all()
    before, _ = lowbit.load(plain)
    batch = zoo.tokens()
    assert torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert 0 < zoo.error(model(batch).logits, before(batch).logits) < 0.02


def test_no_bits_leave_the_head_alone() -> None:
    model, _ = lowbit.load(quantized.folder("llama"))
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
