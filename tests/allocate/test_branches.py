"""The loss of a branch is that of the whole model in which only its unit is quantized."""

from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.allocate import branches as module
from lowbit.allocate.branches import Branch, Branches
from lowbit.blocks import BlockTask
from lowbit.blocks.walk import Step
from lowbit.formats.base import QuantizedLinear
from lowbit.methods import RTN
from lowbit.models.source import SourceModel
from lowbit.pipeline.job import Job
from lowbit.pipeline.options import RunOptions

pytestmark = pytest.mark.slow

METHOD = RTN(bits=2, group_size=16)
# Units of each family, as patterns: in the first block, and in the second.
UNITS = {
    "llama": (["layers.0.self_attn.[qkv]_proj"], ["layers.1.mlp.down_proj"]),
    "opt": (["layers.0.fc1"], ["layers.1.self_attn.out_proj"]),
    "mixtral": (["layers.0.*experts.*"], ["layers.1.self_attn.o_proj"]),
}


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("name", UNITS)
def test_losses(name: str, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", 14 * zoo.VOCABULARY)  # several pieces
    folder, windows = quantized.source(name), zoo.tokens(rows=5)
    source = SourceModel(folder)
    stream = source.first_stream(windows.split(module.AT_ONCE))
    runs: list[None] = []
    place = tmp_path / "streams"
    made = Branches(windows, stream, place if on_disk else None, lambda: runs.append(None))
    jobs = [Job(folder, METHOD, None, RunOptions(device="cpu", only=tuple(u))) for u in UNITS[name]]

    def visit(step: Step) -> None:
        made.advance(step.block)
        task = BlockTask(
            name=step.name,
            block=step.block,
            groups=jobs[step.index].selection.groups(step.name),
            folds=(),
            streams={},
            seed=0,
            log=zoo.log(),
        )
        made.open(Branch(step.index, 2.0), step.block, METHOD.quantize(task).linears)
        linears = [name for group in task.groups for name in group.linears]
        assert not any(isinstance(step.block.get_submodule(n), QuantizedLinear) for n in linears)
        step.advance()

    source.walk({"float": stream}, visit)
    found = made.losses(source.without_blocks(), zoo.VOCABULARY)
    assert len(runs) == 2 * (2 + 1) and place.exists() == on_disk
    expected = predictions(AutoModelForCausalLM.from_pretrained(folder), windows)
    for index, unit in enumerate(UNITS[name]):
        out = quantized.quantize(folder, tmp_path / f"out-{index}", METHOD, only=tuple(unit))
        model, _ = lowbit.load(out)
        terms = functional.kl_div(
            predictions(model, windows), expected, log_target=True, reduction="sum"
        )
        wanted = float(terms) / expected[..., 0].numel()
        assert wanted > 1e-6
        assert found[Branch(index, 2.0)] == pytest.approx(wanted, rel=1e-3)


def predictions(model: Any, windows: Tensor) -> Tensor:
    return torch.log_softmax(quantized.logits(model, windows)[:, :-1].double(), -1)


def test_a_broken_model_is_refused() -> None:
    source, windows = SourceModel(quantized.source()), zoo.tokens()
    stream = source.first_stream([windows])
    made = Branches(windows, stream)

    def visit(step: Step) -> None:
        made.advance(step.block)
        if step.index == 0:
            name = "mlp.down_proj"
            broken = nn.Linear(80, 48, bias=False)
            broken.weight.data.fill_(torch.nan)
            made.open(Branch(0, 2.0), step.block, {name: broken})
        step.advance()

    source.walk({"float": stream}, visit)
    with pytest.raises(ValueError, match="not numbers: check the model"):
        made.losses(source.without_blocks(), zoo.VOCABULARY)
