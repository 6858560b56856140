"""Options that are wrong before anything is read."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.config import shapes_result
from lowbit.pipeline.options import Compute, RunOptions, precision_of

# What a run is continued by; a change here makes runs that were begun before start over.
SHAPES = {
    "device",
    "compute",
    "allow_float",
    "skip",
    "only",
    "lm_head_bits",
    "embedding_bits",
    "start_from",
    "recipe",
}


@pytest.mark.parametrize("name", RunOptions.model_fields)
def test_every_option_says_whether_it_shapes_the_result(name: str) -> None:
    assert shapes_result(RunOptions.model_fields[name]) == (name in SHAPES)


def test_those_that_shape_the_result_are_json_values() -> None:
    chosen = RunOptions(skip=("q_proj",), start_from=Path("x"), restart=True, cache=Path("y"))
    assert chosen.shaping_result() == {
        "device": "auto",
        "compute": "auto",
        "allow_float": [],
        "skip": ["q_proj"],
        "only": [],
        "lm_head_bits": None,
        "embedding_bits": None,
        "start_from": "x",
        "recipe": None,
    }


@pytest.mark.parametrize(
    ("function", "config"),
    [
        (lowbit.quantize, RunOptions),
        (lowbit.plan, RunOptions),
        (lowbit.preprocess, RunOptions),
        (lowbit.evaluate, lowbit.EvalOptions),
        (lowbit.tune, lowbit.TuneOptions),
    ],
    ids=lambda value: value.__name__,
)
def test_the_keywords_of_a_function_are_the_fields(
    function: Callable[..., Any], config: Any
) -> None:
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    # Objects, which no configuration holds, and what belongs to one process of a run.
    others = {"tokenizer", "on_event", "on_progress", "worker"}
    others |= {"device_memory", "without_weights"}  # of plan alone
    fields = {name: field.default for name, field in config.model_fields.items()}
    options = {name: value for name, value in keywords.items() if name not in others}
    assert options == fields and list(options) == list(fields)


@pytest.mark.parametrize(
    ("compute", "device", "wanted"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "cuda", "tf32"),
        ("float32", "cuda", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
        ("tf32", "cpu", None),
    ],
)
def test_the_precision_of_a_run(compute: Compute, device: str, wanted: str | None) -> None:
    if wanted is None:
        with pytest.raises(ValueError, match="compute is tf32, which only CUDA devices have"):
            precision_of(compute, torch.device(device))
    else:
        assert precision_of(compute, torch.device(device)) == wanted
