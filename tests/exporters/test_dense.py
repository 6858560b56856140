"""A float model says whether its dtype holds every weight."""

import json
from pathlib import Path

import pytest
import quantized
from safetensors.torch import load_file

import lowbit

# By dtype, what is said of the layers: 4-bit codes times float16 scales need up to 15 bits.
OUTCOMES = {
    "float32": "exact",
    "float16": "rounded to float16",
    "bfloat16": "rounded to bfloat16",
}


@pytest.mark.parametrize("dtype", OUTCOMES)
def test_rounding_to_the_dtype_is_said(dtype: str, tmp_path: Path) -> None:
    folder, dest = quantized.folder(method="rtn"), tmp_path / "dest"
    plan = lowbit.export(folder, dest, "dense", dtype=dtype)
    assert {layer.outcome for layer in plan.layers} == {OUTCOMES[dtype]}
    model, _ = lowbit.load(folder)
    written = {k: v for path in dest.glob("*.safetensors") for k, v in load_file(path).items()}
    layer = plan.layers[0]
    weight = model.get_submodule(layer.name).dequantize()
    equal = bool((written[f"{layer.name}.weight"].float() == weight).all())
    assert equal == (dtype == "float32")
    record = json.loads((dest / "export.json").read_text())["layers"]
    assert {facts.get("rounded") for facts in record.values()} == {None if equal else dtype}
    said = "every weight equal" if equal else OUTCOMES[dtype]
    assert said in (dest / "README.md").read_text()
