"""Models that differ from the usual ones in their sizes or in how they are stored."""

import json
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import quantized
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.load import load_model
from lowbit.methods import GPTQ, RTN
from lowbit.models.generation import greedy

pytestmark = [pytest.mark.slow, pytest.mark.families]

FILE, METADATA = "model.safetensors", {"format": "pt"}


def save(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, **more: object) -> None:
    families.make(name, **more).to(dtype).save_pretrained(folder)
    quantized.add_tokenizer(folder)


def head_in_another_file(folder: Path) -> None:
    save(folder, "qwen2")
    state = load_file(folder / FILE)
    (folder / FILE).unlink()
    parts = {"output.safetensors": {"lm_head.weight": state.pop("lm_head.weight")}}
    parts["blocks.safetensors"] = state
    for file, tensors in parts.items():
        save_file(tensors, folder / file, metadata=METADATA)
    placed = {name: file for file, tensors in parts.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))


def norms_in_float32(folder: Path) -> None:
    save(folder, "qwen3")
    state = load_file(folder / FILE)
    state |= {name: tensor.float() for name, tensor in state.items() if "norm" in name}
    save_file(state, folder / FILE, metadata=METADATA)


def tied_without_prefix(folder: Path) -> None:
    save(folder, "llama", tie_word_embeddings=True)
    state = load_file(folder / FILE)
    state = {n.removeprefix("model."): t for n, t in state.items() if n != "lm_head.weight"}
    save_file(state, folder / FILE, metadata=METADATA)


MODELS: dict[str, Callable[[Path], None]] = {
    # RWKV halves its hidden states after every sixth block.
    "RWKV with eight blocks": lambda folder: save(folder, "rwkv", num_hidden_layers=8),
    "blocks that read earlier state": lambda folder: save(folder, "gemma3n_text"),
    "a head in another file": head_in_another_file,
    "norms in float32": norms_in_float32,
    "tied and without a prefix": tied_without_prefix,
    "one block": lambda folder: save(folder, "mistral", torch.float16, num_hidden_layers=1),
    "one block without attention": lambda folder: save(
        folder, "lfm2", num_hidden_layers=1, layer_types=["conv"]
    ),
    "widths that no group divides": lambda folder: save(
        folder,
        "llama",
        hidden_size=60,
        intermediate_size=100,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=20,
    ),
    "more experts than tokens": lambda folder: save(
        folder, "qwen3_moe", num_experts=48, num_experts_per_tok=2, num_hidden_layers=2
    ),
    "a window shorter than the text": lambda folder: save(folder, "gemma3_text", sliding_window=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_planned_quantized_and_measured(name: str, tmp_path: Path) -> None:
    source = tmp_path / "float"
    MODELS[name](source)
    method = GPTQ(bits=8, min_tokens=8)
    planned = lowbit.plan(source, method, quantized.calibration(), device="cpu")
    assert planned.seconds > 0
    out = quantized.quantize(source, tmp_path / "out", method)
    quantized.quantize(source, tmp_path / "rtn", RTN(bits=4), self_check=False)
    model = load_model(out)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    tokens = families.tokens(1)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted, found = (m(input_ids=tokens, use_cache=False).logits for m in (whole, model))
    assert 0 < families.error(found, wanted) < 0.12
    rows = [
        lowbit.evaluate(
            [tmp_path / folder], texts=[quantized.text()], seqlen=48, limit=2, reference=source
        )[0]
        for folder in ("out", "rtn")
    ]
    fine, coarse = (next(iter((row.divergence or {}).values())).kl for row in rows)
    assert abs(fine) < coarse
    assert len(greedy(model, [5, 6, 7], 8)) == 8


def test_a_float_model_that_does_not_run_is_named(tmp_path: Path) -> None:
    save(tmp_path / "float", "qwen3_moe", hidden_size=60)  # its heads then have an odd width
    with pytest.raises(ValueError, match="forward pass of Qwen3MoeForCausalLM .* fails"):
        quantized.quantize(tmp_path / "float", tmp_path / "out", "rtn")
