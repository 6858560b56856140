"""The first packed block of each kind runs once; what fails or differs is refused by name."""

from pathlib import Path
from typing import Any

import families
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


STATE = {
    "keys and values in a dictionary": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "a value that each block returns": ("zaya", {}),
}


@pytest.mark.families
@pytest.mark.parametrize("kind", STATE)
def test_a_block_that_reads_state_gets_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: dict[str, float | None] = {}

    def spy(source: Any, block: Any, name: str, result: Any) -> None:
        checked[name] = packed_check.check_packed(source, block, name, result)

    monkeypatch.setattr(job, "check_packed", spy)
    name, options = STATE[kind]
    assert options.items() <= families.small(name).to_dict().items()
    families.make(name).save_pretrained(tmp_path / "float")
    quantized.quantize(tmp_path / "float", tmp_path / "out", FINE, without_tokenizer=True)
    assert len(checked) > 1
    assert all(error is not None and error < 1e-5 for error in checked.values()), checked


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
