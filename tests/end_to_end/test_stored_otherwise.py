"""Float folders are written as their sources: experts stacked, and Conv1D transposed."""

from pathlib import Path

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.load import load_model
from lowbit.methods import RTN

# By model type, a layer that other programs look for in another form, and the word for that.
# gpt_oss: transposed, interleaved, with biases; dbrx: one matrix below the other.
KINDS = {
    "gpt2": ("h.0.attn.c_attn", "Conv1D"),
    "gpt_oss": ("layers.0.mlp.experts.0.gate_proj", "experts.gate_up_proj"),
    "dbrx": ("blocks.0.ffn.experts.0.gate_proj", "experts.mlp.w1"),
    "llama4_text": ("layers.0.feed_forward.experts.0.gate_proj", "experts.gate_up_proj"),
    "granitemoe": ("layers.0.block_sparse_moe.experts.0.gate_proj", "input_linear"),
    "jetmoe": ("layers.0.mlp.input_linear.0.linear", "input_linear.weight"),
}
REFUSING = ("ct", "gptq", "awq", "mlx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n if n == "gpt2" else pytest.param(n, marks=pytest.mark.families) for n in KINDS]
)
def test_a_float_folder_is_as_its_source(name: str, tmp_path: Path) -> None:
    families.make(name).save_pretrained(tmp_path / "float")
    out = lowbit.quantize(
        tmp_path / "float",
        tmp_path / "out",
        RTN(bits=4, group_size=32, symmetric=True),
        device="cpu",
        without_tokenizer=True,
        self_check=False,
    )
    lowbit.dequantize(out, tmp_path / "dequantized")
    lowbit.export(out, tmp_path / "exported", "dense")
    assert lowbit.verify(tmp_path / "exported", out).equal
    tokens, before = families.tokens(1), CheckpointReader(tmp_path / "float")
    with torch.no_grad():
        wanted = load_model(out)(input_ids=tokens, use_cache=False).logits
        for folder in ("dequantized", "exported"):
            after = CheckpointReader(tmp_path / folder)
            shapes = [{n: t.shape for n, t in r.tensors.items()} for r in (before, after)]
            assert shapes[0] == shapes[1]
            model = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
            found = model(input_ids=tokens, use_cache=False).logits
            assert families.error(found, wanted) < 1e-5
    layer, word = KINDS[name]
    for target in REFUSING:
        if name == "gpt2" and target == "gptq":
            continue  # GPTQModel and vLLM read these layers like any other
        with pytest.raises(ValueError, match=f"{layer}|no model of the arch") as caught:
            lowbit.export(out, tmp_path / target, target)
        assert word in str(caught.value) or target in ("awq", "mlx")
        assert not (tmp_path / target).exists()
