import json

import pytest
import quantized
import torch
from safetensors.torch import load_file

from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.checkpoint.output import Size, report_of, size_of
from lowbit.formats.uniform import tensor_bytes


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_size_is_counted_from_the_bytes(name: str) -> None:
    folder = quantized.folder(name)
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    packed = weights = 0
    for linear, entry in QuantizedFolder(folder).entries.items():
        spec = {k: v for k, v in entry.items() if k not in ("format", "bias")}
        parts = [tensors.pop(f"{linear}.{part}") for part in ("packed", "scale", "zero")]
        assert sum(part.nbytes for part in parts) == tensor_bytes(**spec)
        packed += tensor_bytes(**spec)
        weights += entry["shape"][0] * entry["shape"][1]
    rest = sum(t.nbytes for t in tensors.values())
    size = size_of(folder)
    assert size.linears == pytest.approx(8 * packed / weights)
    assert 5 < size.linears < 6  # 4, and a scale and a zero point for every 16 at most
    parameters = weights + sum(t.numel() for t in tensors.values())
    assert size.model == pytest.approx(8 * (packed + rest) / parameters)
    assert size.bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    source = CheckpointReader(quantized.source(name)).tensors
    assert parameters == sum(torch.Size(info.shape).numel() for info in source.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_of_a_float_model(dtype: torch.dtype) -> None:
    folder = quantized.source("llama", dtype)
    stored = (folder / "model.safetensors").stat().st_size
    bits = 8 * dtype.itemsize
    assert size_of(folder) == Size(bits, bits, stored)


def test_the_report_names_what_was_given_up() -> None:
    records = [
        {"file": "outside"},
        {"on_disk": "h.0", "report": {"rounded_to_nearest": {"mlp.up": 3}, "x": 1}},
        {"on_disk": "h.1", "report": {"fell_back": "nothing learned was better"}},
        {"on_disk": "h.2", "report": {"without_feedback": ["mlp.up"]}},
        {"on_disk": "h.3", "report": {"shared_hessian": {"mlp.up": 9}}},
    ]
    assert report_of(records, ["h.0.gate"]) == {
        "given_up": {
            "h.0.mlp.up": "rounded to nearest: it saw only 3 calibration tokens",
            "h.1": "nothing learned was better",
            "h.2.mlp.up": "rounded to nearest: its Hessian would not factor",
            "h.3.mlp.up": "took the Hessian of all experts: it saw only 9 tokens",
        },
        "left_float": ["h.0.gate"],
        "blocks": {f"h.{i}": records[i + 1]["report"] for i in range(4)},
    }


@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_the_report_lists_every_linear(name: str) -> None:
    """Mixtral's experts have other names in memory."""
    report = json.loads((quantized.folder(name) / "report.json").read_text())
    entries = QuantizedFolder(quantized.folder(name)).entries
    listed = {
        f"{b}.{linear}" for b, facts in report["blocks"].items() for linear in facts["linears"]
    }
    assert listed == set(entries)
