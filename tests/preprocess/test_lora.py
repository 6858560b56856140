import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import zoo

from lowbit.blocks import Event
from lowbit.preprocess.lora import LoRA, train

MODEL = zoo.make(zoo.ZOO["llama"])
LINEARS = [f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("up", "down")]


def run(tmp_path: Path, log: Any = lambda event: None, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"rank": 2, "seqlen": 16, "steps": 2, "accumulate": 1}
    lora = LoRA(**options | changes)
    return train(
        deepcopy(MODEL), LINEARS, zoo.tokens(rows=2, length=16), lora, tmp_path / "state", 0, log
    )


def test_the_report_says_what_was_seen(tmp_path: Path) -> None:
    report = run(tmp_path, targets=("down_proj",))
    assert report["linears"] == 2 and report["tokens_seen"] == 32
    assert report["trained_parameters"] == 2 * 2 * (48 + 80)
    assert len(report["loss"]) == 2


def test_the_callers_generators_are_left_alone(tmp_path: Path) -> None:
    states = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()]
    run(tmp_path)
    after = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()]
    assert states[:2] == after[:2] and torch.equal(states[2], after[2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("w1",)}, "targets w1 match no linear of this model"),
        ({"learning_rate": 1e30, "steps": 3, "batch": 1}, "the loss is nan at step .: lower the"),
    ],
)
def test_what_cannot_be_trained_is_said(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)


def test_steps_are_events(tmp_path: Path) -> None:
    seen: list[Event] = []
    run(tmp_path, seen.append, steps=3)
    assert [(e.kind, e.data["step"], e.data["of"]) for e in seen] == [
        ("step", i, 3) for i in (1, 2, 3)
    ]
