"""The quantization method that vLLM sees: names, widths, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from vllm_stand_in import PACKED, LinearBase, Renaming, UnquantizedLinearMethod

from lowbit.methods import OmniQuant


def test_layers_that_are_not_quantized(vllm: Any) -> None:
    config = vllm.config(quantized.section(quantized.folder()))
    layer = LinearBase(config, "model.vision.proj", [8], 8)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


@pytest.mark.parametrize("mapping", [PACKED, {}])
def test_stacks(mapping: Any, vllm: Any) -> None:
    """Some models tell vLLM what they stack only after the linears are made."""
    config = vllm.config(quantized.section(quantized.folder()))
    config.packed_modules_mapping = mapping
    layer = LinearBase(config, "model.layers.1.mlp.gate_up_proj", [80, 80], 48)
    assert layer.quant_method.names == [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")]


def test_names_that_vllm_changes(vllm: Any) -> None:
    config = vllm.config(quantized.section(quantized.folder("llama", "quip")))
    shared = {entry["shares"] for entry in config.entries.values()} - {None}
    config.apply_vllm_mapper(Renaming())
    assert all(name.startswith("language_model.model.") for name in config.entries)
    renamed = {entry["shares"] for entry in config.entries.values()} - {None}
    assert shared and renamed == {f"language_model.{name}" for name in shared}


def test_widths_of_a_master(vllm: Any) -> None:
    vllm.additional["lowbit_bits"] = {"*": 4, "mlp.*": 3}
    config = vllm.config(quantized.section(quantized.folder("llama", "matquant")))
    LinearBase(config, "model.layers.0.mlp.down_proj", [48], 80)
    widths = {name.split(".")[3]: entry["bits"] for name, entry in config.entries.items()}
    assert widths == {"mlp": 3, "self_attn": 4}


def test_widths_of_a_model_without_slices(vllm: Any) -> None:
    vllm.additional["lowbit_bits"] = 4
    config = vllm.config(quantized.section(quantized.folder()))
    with pytest.raises(ValueError, match="no layer is nested"):
        LinearBase(config, "model.layers.0.mlp.down_proj", [48], 80)


def test_a_damaged_folder_is_refused(vllm: Any, tmp_path: Path) -> None:
    made = quantized.quantize(quantized.source(), tmp_path / "made")
    config = vllm.config(quantized.section(made))
    config.maybe_update_config(str(made), hf_config=None)
    config.maybe_update_config("someone/a-model-of-the-hub")
    shard = sorted(made.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=shard.name):
        config.maybe_update_config(str(made), hf_config=None)


def test_rounded_attention_is_refused(vllm: Any, tmp_path: Path) -> None:
    method = OmniQuant(bits=4, activation_bits=4, epochs=0, min_tokens=1)
    made = quantized.quantize(quantized.source(), tmp_path / "made", method)
    with pytest.raises(
        ValueError, match="self_attn rounds its queries, keys or values, which vLLM"
    ):
        vllm.config(quantized.section(made))


def test_a_config_that_was_edited(vllm: Any) -> None:
    section = quantized.section(quantized.folder())
    section["modules"] = {"a": {"format": "unknown"}}
    with pytest.raises(ValueError, match="layer a: format"):
        vllm.config(section)


def test_a_packed_table_is_refused_by_name(vllm: Any, tmp_path: Path) -> None:
    made = quantized.quantize(quantized.source(), tmp_path / "made", embedding_bits=8)
    with pytest.raises(ValueError, match="embed_tokens is a packed table of embeddings"):
        vllm.config(quantized.section(made))
