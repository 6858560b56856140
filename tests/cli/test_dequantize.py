"""lowbit dequantize."""

import pytest
import torch
from safetensors.torch import load_file
from zoo import MODELS

from lowbit.checkpoint.output import size_of
from lowbit.cli.screen import size

pytestmark = pytest.mark.slow


def test_sizes_and_what_stays_behind(lowbit, learned, tmp_path):
    dense = tmp_path / "dense"
    lines = lowbit("dequantize", learned, dense).stdout.splitlines()
    before, after = size_of(learned), size_of(dense)
    files = "in model-00001-of-00007.safetensors and 6 more"
    assert lines[0] == f"{learned}: {size(before.bytes)} of weights {files}"
    assert lines[1] == f"{dense}: {size(after.bytes)} of weights {files}"
    assert lines[2] == "not copied: README.md, events.jsonl, learned, report.json, run"
    assert lines[3].startswith(f"{before.model:.2f} → 16.00 bits per parameter")
    source = load_file(MODELS / "llama-mini" / "model.safetensors")
    found = {n: t for path in dense.glob("*.safetensors") for n, t in load_file(path).items()}
    assert found.keys() == source.keys()
    assert all(found[n].dtype == source[n].dtype and found[n].isfinite().all() for n in source)
    assert torch.equal(found["model.embed_tokens.weight"], source["model.embed_tokens.weight"])


def test_mistakes(lowbit, rtn, tmp_path):
    assert "exists already" in lowbit("dequantize", rtn, tmp_path, code=1).stderr
    model = MODELS / "llama-mini"
    output = lowbit("dequantize", model, tmp_path / "out", code=1).stderr
    assert "was not quantized by lowbit" in output
