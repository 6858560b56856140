import pytest
import quantized
import torch
from safetensors.torch import load_file

from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.checkpoint.output import Size, size_of
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
