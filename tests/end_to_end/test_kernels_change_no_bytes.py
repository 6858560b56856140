"""The bytes of a run never depend on the compiled kernels."""

from pathlib import Path

import pytest
import quantized
import torch

import lowbit
from lowbit.kernels.native import why_not
from lowbit.kernels.native.library import VARIABLE, available
from lowbit.methods import Method, Trellis

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="needs a compiler: the kernels were not compiled"),
]


TRELLIS = Trellis(rate=1.5, state_bits=9, min_tokens=8, scale=1.1, row_scale="never")


@pytest.mark.parametrize("method", ["omniquant", "gptq", "quip", TRELLIS])
def test_a_run_with_and_without_kernels(
    method: str | Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, logits = {}, {}
    for setting in ("", "off"):
        monkeypatch.setenv(VARIABLE, setting)
        assert (why_not() is None) == (setting == "")
        out = quantized.quantize(quantized.source(), tmp_path / "out", method)
        found[setting] = quantized.contents(out)
        logits[setting] = quantized.logits(lowbit.load(out)[0])
        out.rename(tmp_path / f"out{setting or 'on'}")
    # The kernels did run in the loaded model, so the comparison of the folders means something.
    assert not torch.equal(logits[""], logits["off"])
    assert {n for n in found[""] if found[""][n] != found["off"].get(n)} <= {"report.json"}
    assert found[""].keys() == found["off"].keys()
