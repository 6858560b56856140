"""Evaluating, choosing widths, preprocessing and tuning on the strict device, as on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch

import lowbit
from lowbit.calibration import Calibration
from lowbit.checkpoint import CheckpointReader
from lowbit.eval import TaskOptions, evaluate
from lowbit.methods import GPTQ, PTQ161, RTN, MixedQuant
from lowbit.pipeline.mix import mix
from lowbit.preprocess import LoRA, preprocess

pytestmark = pytest.mark.slow

FEW: dict[str, Any] = {"min_tokens": 1}
TUNED = {
    "uniform": "rtn",
    "lattice": "quip",
    "binary": PTQ161(epochs=0, alignment=4, salient_ratio=0.2, **FEW),
    "sorted_group": MixedQuant(group_size=16, salient_ratio=0.1, alignment=4, **FEW),
}


def on_both(compute: Any) -> tuple[Any, Any]:
    return compute("cpu"), compute("strict:0")


def weights(folder: Path) -> dict[str, bytes]:
    found = quantized.contents(folder)
    return {name: found[name] for name in found if name.endswith(".safetensors")}


def test_perplexity_and_divergence() -> None:
    model, reference = quantized.folder(), quantized.source()

    def rows(device: str) -> Any:
        [row] = evaluate(
            [model], texts=(quantized.text(),), seqlen=16, limit=2, device_map=device,
            reference=reference,
        )  # fmt: skip
        return row

    cpu, strict = on_both(rows)
    assert strict.perplexity == cpu.perplexity
    assert strict.divergence == cpu.divergence and strict.divergence

    def alone(device: str) -> Any:
        [row] = evaluate(
            [model, ], texts=(quantized.text(),), seqlen=16, limit=2, device_map=device
        )  # fmt: skip
        return row.perplexity[quantized.text()]

    cpu, strict = on_both(alone)
    assert strict == pytest.approx(cpu, rel=1e-5)


def test_tasks(tmp_path: Path) -> None:
    row = {"question": "abc", "choices": {"text": ["d", "ef"], "label": ["A", "B"]}}
    (tmp_path / "arc_easy").mkdir()
    file = tmp_path / "arc_easy" / "validation.jsonl"
    file.write_text("\n".join(json.dumps(row | {"answerKey": key}) for key in "AB"))

    def scores(device: str) -> Any:
        [found] = evaluate(
            [quantized.folder()],
            texts=(),
            tasks=TaskOptions(folder=tmp_path),
            device_map=device,
        )
        return found.tasks

    cpu, strict = on_both(scores)
    assert strict == cpu and strict


@pytest.mark.exhaustive
def test_widths_of_a_float_model() -> None:
    def plan(device: str) -> Any:
        made = mix(
            quantized.source(),
            "4.5",
            GPTQ(bits=4, group_size=16, **FEW),
            calibration=quantized.calibration(),
            device=device,
        )
        return made.overrides, made.predicted if hasattr(made, "predicted") else None

    cpu, strict = on_both(plan)
    assert strict == cpu


@pytest.mark.exhaustive
def test_widths_of_a_matquant_folder() -> None:
    def plan(device: str) -> Any:
        return lowbit.mix(
            quantized.master(), "4.5", calibration=quantized.calibration(), device_map=device
        )

    cpu, strict = on_both(plan)
    assert strict.plan == cpu.plan
    assert strict.predicted == pytest.approx(cpu.predicted, rel=1e-3)


@pytest.mark.exhaustive
def test_preprocess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = quantized.calibration()
    lora = LoRA(
        rank=4, alpha=8, seqlen=16, batch=2, steps=2, save_every=1, sources=(quantized.text(),),
        dropout=0.0, learning_rate=0.01,
    )  # fmt: skip
    first = RTN(bits=2, group_size=16)

    def trained(device: str) -> Any:
        out = tmp_path / device
        if device != "cpu":
            with pytest.raises(ValueError, match="ACCELERATE_TORCH_DEVICE=strict:0"):
                preprocess(quantized.source(), out, first, lora, text, device=device)
            monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
            monkeypatch.setattr(torch.strict, "is_available", lambda: False)  # no pinned memory
        preprocess(quantized.source(), out, first, lora, text, device=device)
        return CheckpointReader(out).read(CheckpointReader(out).tensors)

    cpu, strict = on_both(trained)
    assert strict.keys() == cpu.keys()
    for name, tensor in strict.items():
        assert tensor.equal(cpu[name]), name


@pytest.mark.parametrize(
    "name", ["uniform", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in [*TUNED][1:])]
)
def test_tune(name: str, tmp_path: Path) -> None:
    folder = quantized.quantize(quantized.source(), tmp_path / "model", TUNED[name])
    text = Calibration(sources=(quantized.text(),), samples=8, seqlen=16)

    def tuned(device: str) -> Any:
        options: dict[str, Any] = {"steps": 2, "batch": 2, "measure_every": 1, "rate": 1e-2}
        out = tmp_path / device
        found = lowbit.tune(folder, out, quantized.source(), text, device=device, **options)
        return found.before, found.after, weights(out)

    cpu, strict = on_both(tuned)
    assert strict == cpu
