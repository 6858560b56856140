import random
import shutil
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import zoo
from torch.nn import functional

from lowbit.events import Event
from lowbit.preprocess import LoRA
from lowbit.preprocess.lora import train

pytestmark = pytest.mark.slow

MODEL = zoo.make(zoo.ZOO["llama"])
LINEARS = [f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("up", "down")]

WINDOWS = zoo.tokens(rows=5, length=16)


def run(tmp_path: Path, log: Any = lambda event: None, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"rank": 2, "seqlen": 16, "steps": 2, "accumulate": 1}
    lora = LoRA(**options | changes)
    model, state = deepcopy(MODEL), tmp_path / "state"
    return train(model, LINEARS, WINDOWS[:2], WINDOWS[2:], lora, state, 0, log)


def test_the_report_says_what_was_seen(tmp_path: Path) -> None:
    report = run(tmp_path, targets="down_proj")
    assert report["linears"] == 2
    assert (report["tokens_seen"], report["held_out_tokens"]) == (32, 48)
    assert report["trained_parameters"] == 2 * 2 * (48 + 80)
    assert len(report["loss"]) == 2


def test_the_loss_before_and_after_is_that_of_the_held_out_windows(tmp_path: Path) -> None:
    held_out = WINDOWS[2:]
    model = deepcopy(MODEL)
    lora = LoRA(rank=2, steps=2, accumulate=1, learning_rate=0.1, dropout=0.5)
    report = train(model, LINEARS, WINDOWS[:2], held_out, lora, tmp_path, 0, lambda event: None)
    for when, measured in (("before", MODEL), ("after", model)):
        with torch.no_grad():
            logits = measured.eval()(held_out).logits[:, :-1]
        wanted = functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
        assert report[f"loss_{when}"] == pytest.approx(float(wanted), rel=1e-5)
    assert report["loss_before"] != pytest.approx(report["loss_after"], rel=1e-3)


def test_a_state_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    """A killed process may leave a partial state; the newest complete one is used."""
    wanted = run(tmp_path / "whole", steps=4, batch=1, save_every=2)
    run(tmp_path, steps=4, batch=1, save_every=2)
    state = tmp_path / "state"
    shutil.rmtree(state / "checkpoint-4")
    for step, text in ((3, None), (10, '{"epoch": 1')):
        broken = state / f"checkpoint-{step}"
        broken.mkdir()
        (broken / "adapter_model.safetensors").write_bytes(b"cut")
        if text is not None:
            (broken / "trainer_state.json").write_text(text)
    steps: list[int] = []
    found = run(tmp_path, lambda e: steps.append(e.step), steps=4, batch=1, save_every=2)
    assert steps == [3, 4] and found == wanted


def test_what_was_trained_to_its_end_says_the_same_again(tmp_path: Path) -> None:
    assert run(tmp_path, save_every=2) == run(tmp_path, save_every=2)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_callers_generators_are_left_alone(tmp_path: Path, stopped: bool) -> None:
    def log(event: Event) -> None:
        if stopped:
            raise KeyboardInterrupt

    states = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()]
    with pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
        run(tmp_path, log)
    after = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()]
    assert states[:2] == after[:2] and torch.equal(states[2], after[2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("w1",)}, "targets w1 match no linear of this model"),
        ({"learning_rate": 1e30, "steps": 3, "batch": 1}, "the loss is nan at step .: lower lora"),
        ({"learning_rate": 1e30, "steps": 1, "warmup": 0}, "the loss is nan at step 1: lower lora"),
    ],
)
def test_impossible_training_is_an_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)


def test_steps_are_events(tmp_path: Path) -> None:
    seen: list[Event] = []
    run(tmp_path, seen.append, steps=3)
    assert [(e.kind, e.step, e.of) for e in seen] == [("step", i, 3) for i in (1, 2, 3)]
