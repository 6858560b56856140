"""The float folder that preprocessing writes, its config.json, and a stopped run."""

import json
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from transformers import AutoModelForCausalLM

from lowbit.checkpoint import CheckpointReader
from lowbit.convert import dequantize
from lowbit.events import Event, TrainingStarted, TrainingStep
from lowbit.methods import RTN
from lowbit.preprocess import LoRA, preprocess

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"rank": 4, "alpha": 8, "seqlen": 16, "batch": 2}
STEPS = {"steps": 4, "save_every": 2}
FIRST = RTN(bits=2, group_size=16)


def restore(model: Path, out: Path, log: Any = lambda event: None, **changes: Any) -> Path:
    lora = LoRA(**SMALL | STEPS | {"sources": (quantized.text(),), "learning_rate": 0.01} | changes)
    return preprocess(model, out, FIRST, lora, quantized.calibration(), device="cpu", on_event=log)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return reader.read(reader.tensors)


@pytest.mark.parametrize(
    ("name", "linears"), [("llama", 14), ("opt", 12), ("mixtral", 32), ("falcon 40b", 8)]
)
def test_a_float_model_with_its_stock_names_comes_out(
    tmp_path: Path, name: str, linears: int
) -> None:
    source = quantized.source(name, torch.bfloat16)
    events: list[Event] = []
    out = restore(source, tmp_path / "out", events.append, steps=8, learning_rate=0.02)
    found, wanted = CheckpointReader(out).tensors, CheckpointReader(source).tensors
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in wanted.items()
    }
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    assert [event.step for event in events if isinstance(event, TrainingStep)] == [*range(1, 9)]
    again = quantized.quantize(out, tmp_path / "again")
    recorded = json.loads((out / "config.json").read_text())["lowbit_preprocess"]
    assert recorded["first_pass"] == FIRST.signature()
    training = recorded["training"]
    assert training["tokens_seen"] == 8 * 2 * 2 * 16 and training["packed"]
    assert training["linears"] == linears  # experts too
    assert not (tmp_path / "out.work").exists()
    assert json.loads((again / "config.json").read_text())["lowbit_preprocess"] == recorded


def test_only_targets_change(tmp_path: Path) -> None:
    source = quantized.source()
    out = weights(restore(source, tmp_path / "out", targets=("q_proj", "mlp.up_proj")))
    first = quantized.quantize(source, tmp_path / "first", FIRST)
    for name, tensor in weights(dequantize(first, tmp_path / "dense")).items():
        target = "q_proj" in name or "up_proj" in name
        assert torch.equal(out[name], tensor) != target, name


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("moment", "name"),
    [("block", "llama"), ("training", "llama"), (1, "llama"), (3, "llama"), (3, "mixtral")],
)
def test_stopped_anywhere_the_same_call_goes_on_to_the_same_bytes(
    tmp_path: Path, moment: str | int, name: str
) -> None:
    def stop(event: Event) -> None:
        if moment in (event.kind, getattr(event, "step", None)):
            raise KeyboardInterrupt

    source = quantized.source(name)
    wanted = restore(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        restore(source, tmp_path / "out", stop)
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    restore(source, tmp_path / "out", lambda e: steps.append(getattr(e, "step", 0)))
    assert weights(tmp_path / "out").keys() == weights(wanted).keys()
    for name, tensor in weights(wanted).items():
        assert torch.equal(weights(tmp_path / "out")[name], tensor), name
    assert (1 in steps) == (moment != 3)


def test_a_changed_run_is_refused_and_an_existing_folder_too(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, TrainingStarted):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(quantized.source(), tmp_path / "out", stop)
    with pytest.raises(ValueError, match="out.work holds a run that differs in lora"):
        restore(quantized.source(), tmp_path / "out", rank=2)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already"):
        restore(quantized.source(), tmp_path / "there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlen": 10**6}, "lora.seqlen is 1,000,000 tokens: the model's context is"),
        ({"steps": 10**4}, "lora.sources, .* use fewer steps or more text"),
    ],
    ids=str,
)
def test_a_text_that_will_not_do_is_refused_before_any_work(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        restore(quantized.source(), tmp_path / "out", **change)
    assert not list(tmp_path.iterdir())


def test_an_output_layer_of_its_own_stays_one(tmp_path: Path) -> None:
    source, lora = (
        quantized.source("llama, tied, biased"),
        LoRA(**SMALL, steps=1, sources=(quantized.text(),)),
    )
    text = quantized.calibration()
    out = preprocess(source, tmp_path / "out", FIRST, lora, text, device="cpu", lm_head_bits=2)
    config = json.loads((out / "config.json").read_text())
    assert "lm_head.weight" in weights(out) and config["tie_word_embeddings"] is False


def test_only_the_first_gpu_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1\\), and name cuda:0"):
        preprocess(quantized.source(), tmp_path / "out", FIRST, LoRA(), device="cuda:1")


def test_a_window_is_as_long_as_the_model_allows(tmp_path: Path) -> None:
    source = quantized.source()
    context = json.loads((source / "config.json").read_text())["max_position_embeddings"]
    events: list[Event] = []
    restore(source, tmp_path / "out", events.append, seqlen=None, steps=1, held_out=1)
    training = next(event for event in events if isinstance(event, TrainingStarted))
    assert training.tokens == min(context, 2048) * 2 * 2
