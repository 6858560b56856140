"""The first packed block of each kind runs once; what fails or differs is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo

from lowbit.formats.uniform import UniformLinear
from lowbit.methods import RTN
from lowbit.pipeline import job, packed_check

pytestmark = pytest.mark.slow
FINE = RTN(bits=8, group_size=16)


@pytest.mark.parametrize(("name", "count"), [("llama", 1), ("qwen3_moe", 2), ("gemma2", 2)])
def test_each_kind_of_block_runs_once(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[float | None] = []

    def spy(*args: Any) -> None:
        errors.append(packed_check.check_packed(*args))

    monkeypatch.setattr(job, "check_packed", spy)
    quantized.quantize(zoo.folder(name), tmp_path / "out", FINE, without_tokenizer=True)
    assert len(errors) == count
    assert all(error is not None and error < 1e-5 for error in errors)


FAULTS = {
    "other values": (lambda self, x: x.new_ones(*x.shape[:-1], self.out_features), "other values"),
    "an error": (lambda self, x: x @ self.weight.missing, "cannot run with packed linears"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_block_that_differs_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, message = FAULTS[fault]
    monkeypatch.setattr(UniformLinear, "forward", forward)
    with pytest.raises(ValueError, match=rf"model\.layers\.0 .*{message}"):
        quantized.quantize(zoo.folder("llama"), tmp_path / "o", FINE, without_tokenizer=True)


def test_the_block_is_as_before_afterwards() -> None:
    task = zoo.task("llama")
    before = {name: p.clone() for name, p in task.block.named_parameters()}
    result = FINE.quantize(task)
    result.tensors = {"input_layernorm.weight": torch.zeros(48)}
    with packed_check.swapped(task.block, result.linears, result.tensors):
        assert isinstance(task.block.mlp.up_proj, UniformLinear)
        assert not task.block.input_layernorm.weight.any()
    after = dict(task.block.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
