"""compressed-tensors folders: exact at all widths, groups and kinds, and stored as documented."""

import json
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.reader import CheckpointReader
from lowbit.methods import RTN, MatQuant, OmniQuant

pytestmark = pytest.mark.slow

ALL = {
    f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}, {size or 'rows'}": (
        bits,
        symmetric,
        size,
    )
    for bits, symmetric, size in [
        *((bits, symmetric, 16) for bits in range(2, 9) for symmetric in (False, True)),
        (4, True, None),
        (3, False, None),
        (5, False, 8),
        (2, True, 32),  # does not divide rows of 48 and 80 inputs
    ]
}


def section(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("bits", "symmetric", "size"), ALL.values(), ids=ALL)
def test_every_grid_is_exact(bits: int, symmetric: bool, size: int | None, tmp_path: Path) -> None:
    method = RTN(bits=bits, symmetric=symmetric, group_size=size)
    made = lowbit.quantize(quantized.source("llama"), tmp_path / "made", method)
    plan = lowbit.export(made, tmp_path / "ct", "ct")
    assert all(layer.exact for layer in plan.layers)
    config = section(tmp_path / "ct")
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"]) == (bits, symmetric)
    one = len(config["config_groups"]) == 1
    assert config.get("dequantize", False) is (one and not symmetric)
    assert all(
        48 % (g["weights"]["group_size"] or 1) == 0 for g in config["config_groups"].values()
    )


def test_stored_as_the_docstring_says(tmp_path: Path) -> None:
    """Codes 0 to 7 of one row are one word; zero points run along rows."""
    made = lowbit.quantize(quantized.source("llama"), tmp_path / "made", RTN(bits=4, group_size=16))
    lowbit.export(made, tmp_path / "ct", "ct")
    name = "model.layers.0.self_attn.q_proj"
    stored = CheckpointReader(tmp_path / "ct").read(
        f"{name}.{key}" for key in ("weight_packed", "weight_zero_point", "weight_shape")
    )
    source: Any = QuantizedFolder(made).layer(name)
    codes, zeros = source.codes(), source.zeros()
    words = stored[f"{name}.weight_packed"]
    assert words.dtype == torch.int32 and words.shape == (48, 6)
    first = sum(int(code) << 4 * place for place, code in enumerate(codes[5, :8]))
    assert int(words[5, 0]) & 0xFFFFFFFF == first
    points = stored[f"{name}.weight_zero_point"]
    assert points.shape == (6, 3)
    along = sum(int(zero) << 4 * place for place, zero in enumerate(zeros[8:16, 2]))
    assert int(points[1, 2]) & 0xFFFFFFFF == along
    assert stored[f"{name}.weight_shape"].tolist() == [48, 48]


def test_layers_of_several_kinds_are_several_schemes(tmp_path: Path) -> None:
    method = RTN(bits=4, group_size=16, overrides={"mlp.down_proj": {"bits": 8, "symmetric": True}})
    made = lowbit.quantize(quantized.source("llama"), tmp_path / "made", method)
    lowbit.export(made, tmp_path / "ct", "ct")
    groups = section(tmp_path / "ct")["config_groups"].values()
    by_bits = {group["weights"]["num_bits"]: group["targets"] for group in groups}
    assert sorted(by_bits[8]) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert len(by_bits[4]) == 12 and "Linear" not in by_bits[4]


@pytest.mark.parametrize("symmetric", [False, True])
def test_transformers_gets_several_schemes_only_if_it_can_read_them(
    symmetric: bool, tmp_path: Path
) -> None:
    """It dequantizes asymmetric layers, and all in the first scheme."""
    overrides: dict[str, Any] = {"mlp.down_proj": {"bits": 8}}
    method = RTN(bits=4, group_size=16, symmetric=symmetric, overrides=overrides)
    made = lowbit.quantize(quantized.source("llama"), tmp_path / "made", method)
    plan = lowbit.export(made, tmp_path / "ct", "ct")
    assert "dequantize" not in section(tmp_path / "ct")
    assert any("transformers fails on it" in note for note in plan.notes) is not symmetric


def test_float_layers_are_ignored(tmp_path: Path) -> None:
    made = lowbit.quantize(
        quantized.source("llama"), tmp_path / "made", RTN(bits=4, group_size=16), skip=["*.up_proj"]
    )
    lowbit.export(made, tmp_path / "ct", "ct")
    ignored = section(tmp_path / "ct")["ignore"]
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"} <= set(ignored)


def test_a_quantized_output_layer_is_not_ignored(tmp_path: Path) -> None:
    method = RTN(bits=4, group_size=16, symmetric=True)
    made = lowbit.quantize(quantized.source("llama"), tmp_path / "made", method, lm_head_bits=8)
    lowbit.export(made, tmp_path / "ct", "ct")
    assert "lm_head" not in section(tmp_path / "ct")["ignore"]


def test_fine_zeros_take_more_bits(tmp_path: Path) -> None:
    method = RTN(bits=2, group_size=16, fine_zeros=True)
    made = lowbit.quantize(quantized.source("llama"), tmp_path / "made", method)
    plan = lowbit.export(made, tmp_path / "ct", "ct")
    assert all(layer.exact for layer in plan.layers)
    assert "2 bits written as 8" in plan.layers[0].changes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_slices_of_a_master(bits: int, tmp_path: Path) -> None:
    method = MatQuant(group_size=16, lwc=False, epochs=0, symmetric=True)
    made = quantized.quantize(quantized.source("llama"), tmp_path / "made", method)
    plan = lowbit.export(made, tmp_path / "ct", "ct", bits=bits)
    assert all(layer.exact for layer in plan.layers)
    weights = section(tmp_path / "ct")["config_groups"]["group_0"]["weights"]
    assert weights["num_bits"] == bits


def test_rounded_inputs_of_8_bits(tmp_path: Path) -> None:
    method = OmniQuant(bits=8, activation_bits=8, symmetric=True, group_size=None, epochs=0)
    made = quantized.quantize(quantized.source("llama"), tmp_path / "made", method)
    with pytest.raises(ValueError, match="self_attn rounds its queries, keys or values"):
        lowbit.export(made, tmp_path / "ct", "ct")
    plan = lowbit.export(made, tmp_path / "ct", "ct", allow_lossy=True)
    assert {layer.error for layer in plan.layers} == {0}
    assert section(tmp_path / "ct")["format"] == "int-quantized"


def test_a_tied_table_gets_the_name_that_others_look_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    zoo.write(zoo.ZOO["llama, tied, biased"], source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    method = RTN(bits=4, group_size=16)
    made = lowbit.quantize(source, tmp_path / "made", method, without_tokenizer=True)
    lowbit.export(made, tmp_path / "ct", "ct")
    names = CheckpointReader(tmp_path / "ct").tensors
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
