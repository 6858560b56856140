"""A Conv1D is read as an nn.Linear, and written as it was stored."""

from pathlib import Path

import quantized
import torch
import zoo
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.models.conv1d import TransposedLinear, as_on_disk


def test_the_state_dict_is_that_of_conv1d() -> None:
    theirs = Conv1D(6, 4)  # outputs, inputs
    zoo.randomise(theirs)
    ours = TransposedLinear(4, 6, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    inside = nn.ModuleDict({"linear": ours})
    states = (inside.state_dict(), nn.ModuleDict({"linear": theirs}).state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    again = as_on_disk(inside, "linear.weight", ours.weight)
    assert torch.equal(again, theirs.weight) and again.is_contiguous()
    assert torch.equal(as_on_disk(inside, "linear.bias", ours.bias), theirs.bias)


def test_what_stays_float_is_stored_as_it_was(tmp_path: Path) -> None:
    model = quantized.source("gpt2")
    out = quantized.quantize(model, tmp_path / "out", "gptq", skip=("attn.c_attn", "*.0.mlp.c_fc"))
    before, after = CheckpointReader(model), CheckpointReader(out)
    kept = [name for name in before.tensors if "attn.c_attn" in name or "h.0.mlp.c_fc" in name]
    assert len(kept) == 6
    assert all(map(torch.equal, before.read(kept).values(), after.read(kept).values()))
    loaded, _ = lowbit.load(out)
    assert zoo.error(quantized.logits(loaded), quantized.logits(lowbit.load(model)[0])) < 0.5


def test_a_slice_is_dequantized_to_conv1d(tmp_path: Path) -> None:
    master = quantized.folder("gpt2", "matquant")
    sliced = lowbit.slice(master, tmp_path / "slice", bits=4)
    dense = lowbit.dequantize(sliced, tmp_path / "dense")
    wanted = quantized.logits(lowbit.load(sliced)[0])
    assert torch.equal(quantized.logits(lowbit.load(dense)[0]), wanted)
