"""Hessians of outputs: those of the whole model, whatever interrupts the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit.blocks.walk import Step
from lowbit.calibration import TokenIds
from lowbit.methods import GPTQ, Method, QuIP
from lowbit.models import streamed
from lowbit.models.skeleton import unfuse_experts
from lowbit.pipeline import RunOptions
from lowbit.pipeline.job import Job
from lowbit.pipeline.output_side import OutputSide, drawn_labels

pytestmark = pytest.mark.slow

METHOD = GPTQ(bits=3, group_size=16, min_tokens=8, output_feedback=True)
FAMILIES = ["llama, tied, biased", "opt", "gpt2", "qwen3_moe", "falcon 40b", "gemma2"]
TOLERANCE = 1e-4


def job_of(name: str, method: Method = METHOD) -> Job:
    text = TokenIds(zoo.tokens(rows=3))
    return Job(quantized.source(name), method, text, RunOptions(device="cpu"))


def found(job: Job, folder: Path, place: Path | None = None) -> OutputSide:
    windows = job.windows()
    assert windows is not None
    side = OutputSide(folder / "outputs")
    side.write(job, windows, place, lambda event: None)
    return side


def whole_model(job: Job, levels: Tensor) -> dict[str, tuple[Tensor, int]]:
    """The sums of g g^T and the numbers of tokens, by the full name of a linear."""
    model: Any = AutoModelForCausalLM.from_pretrained(job.source.folder, dtype=torch.float32)
    unfuse_experts(model)
    sums: dict[str, tuple[Tensor, int]] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, args: Any, out: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                rows = gradient.reshape(-1, gradient.shape[-1]).double()
                total, tokens = sums.get(name, (torch.zeros(()), 0))
                sums[name] = total + rows.T @ rows, tokens + len(rows)

            out.register_hook(add)

        return keep

    for name in job.selection.linears:
        model.get_submodule(name).register_forward_hook(hook(name))
    for tokens, level in zip(zoo.tokens(rows=3), levels, strict=True):
        logits = model(tokens[None], use_cache=False).logits[0]
        labels = drawn_labels(logits.detach(), level)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return sums


@pytest.mark.parametrize("name", FAMILIES)
def test_as_of_the_whole_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "LOGITS", 5 * zoo.VOCABULARY)  # logits come in pieces
    drawn: list[Tensor] = []
    rand = torch.rand

    def spy(*args: Any, **options: Any) -> Tensor:
        drawn.append(rand(*args, **options))
        return drawn[-1]

    job = job_of(name)
    monkeypatch.setattr(torch, "rand", spy)
    side = found(job, tmp_path)
    wanted = whole_model(job, torch.cat(drawn))
    for index, block in enumerate(job.blocks):
        for linear, hessian in side.of(index).items():
            total, tokens = wanted.pop(f"{block}.{linear}", (torch.zeros(()), 0))
            assert hessian.tokens == tokens
            if tokens:
                assert zoo.error(hessian.matrix * tokens, total) < TOLERANCE, linear
    assert not wanted and side.is_complete


def test_on_disk_as_in_memory(tmp_path: Path) -> None:
    job = job_of("llama")
    memory = found(job, tmp_path / "memory")
    disk = found(job, tmp_path / "disk", tmp_path / "place")
    assert not (tmp_path / "place").exists()
    for index in range(len(job.blocks)):
        for linear, hessian in memory.of(index).items():
            assert torch.equal(disk.of(index)[linear].matrix, hessian.matrix)


def test_labels_are_drawn_from_the_predictions() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(4000, 4)
    levels = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels[0], levels[1] = 0.0, 1.0 - 2**-53
    labels = drawn_labels(logits, levels)
    assert labels[0] == 0 and labels[1] == 3
    shares = labels.bincount(minlength=4) / len(labels)
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.02)


def stopped_at(block: int, monkeypatch: pytest.MonkeyPatch, model: Path, out: Path) -> None:
    """Begins a run, and stops it before a block."""
    quantize_block = Job.quantize_block

    def stop(self: Any, writer: Any, step: Step, log: Any) -> Any:
        if step.index == block:
            raise KeyboardInterrupt
        return quantize_block(self, writer, step, log)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "quantize_block", stop)
        quantized.quantize(model, out, METHOD)


def passes(out: Path) -> int:
    """How often the model was passed through."""
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return sum(line["kind"] == "gradients" and line["done"] == 1 for line in lines)


def test_a_resumed_run_uses_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = quantized.source(), tmp_path / "out"
    whole = quantized.quantize(model, tmp_path / "whole", METHOD, streams="disk")
    assert not (whole / "run" / "outputs").exists() and passes(whole) == 1
    stopped_at(1, monkeypatch, model, out)
    quantized.quantize(model, out, METHOD)
    assert passes(out) == 1 and quantized.contents(out) == quantized.contents(whole)
    again = tmp_path / "again"
    stopped_at(0, monkeypatch, model, again)
    (file,) = (again / "run" / "outputs").glob("00001.*")
    tensors = load_file(file)
    quantized.edit_shard(
        file, lambda tensors: tensors.update({n: t * 0 for n, t in tensors.items()})
    )
    assert not torch.equal(load_file(file)["mlp.up_proj.matrix"], tensors["mlp.up_proj.matrix"])
    quantized.quantize(model, again, METHOD)
    assert passes(again) == 2 and quantized.contents(again) == quantized.contents(whole)


@pytest.mark.parametrize("method", [METHOD, QuIP(output_feedback=True)], ids=lambda m: m.name)
def test_a_model_that_cannot_be_differentiated_is_refused(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise NotImplementedError("derivative for aten::odd is not implemented")

    monkeypatch.setattr(torch.autograd, "backward", fail)
    with pytest.raises(ValueError, match="output_feedback needs gradients.*aten::odd.*to false"):
        quantized.quantize(quantized.source(), tmp_path / "out", method)
