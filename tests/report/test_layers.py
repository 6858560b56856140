"""Linears whose names differ only in a number form one layer."""

import math
from typing import Any

import pytest

from lowbit.report.layers import Layer, Linear, layers_of, settings
from lowbit.run_report import LinearReport

ENTRY = {"format": "uniform", "shape": [4, 16], "bias": None, "bits": 2, "group_size": 8}


def linear(
    name: str,
    error: float | None = None,
    bytes_: int = 16,
    fallback: str | None = None,
    **facts: Any,
) -> Linear:
    report = None if error is None else LinearReport(signal_to_noise_db=error, **facts)
    return Linear(name=name, entry=ENTRY, bytes=bytes_, report=report, fallback=fallback)


def test_experts_are_one_layer() -> None:
    names = ["attn.q", "moe.0.w1", "moe.0.w2", "moe.1.w1", "moe.1.w2", "mlp2.up"]
    found = [(layer.name, len(layer.linears)) for layer in layers_of(map(linear, names))]
    assert found == [("attn.q", 1), ("moe.*.w1", 2), ("moe.*.w2", 2), ("mlp2.up", 1)]


def test_what_several_have_together() -> None:
    layer = Layer(
        "moe.*.w",
        (
            linear("moe.0.w", 9.0, proxy_loss=0.5),
            linear("moe.1.w", 7.0, bytes_=24, fallback="it saw only 3 tokens"),
            linear("moe.2.w", None),
            linear("moe.3.w", math.inf, proxy_loss=0.7),
        ),
    )
    assert (layer.bytes, layer.weights, layer.bits) == (72, 256, 2.25)
    assert layer.worst is layer.linears[1] and layer.error == 7.0
    assert layer.best_error == math.inf and layer.proxy_loss == 0.7
    assert [x.name for x in layer.fallbacks] == ["moe.1.w"]
    assert (layer.settings, layer.shapes) == ("uniform, 2 bits, groups of 8", "4 × 16")


def test_slices_of_a_nested_format() -> None:
    slices = {8: math.inf, 4: 20.0}, {8: 45.0, 4: 21.0}
    made = tuple(linear(name, 9.0, slices_db=s) for name, s in zip("ab", slices, strict=True))
    assert Layer("*", made).slices == {8: 45.0, 4: 20.0}
    assert Layer("*", made[:1]).slices == {8: math.inf, 4: 20.0}


def test_nothing_is_known() -> None:
    layer = Layer("up", (linear("up"),))
    assert layer.worst is layer.error is layer.best_error is layer.proxy_loss is None


SETTINGS = {
    "uniform, 4 bits, per row": {"bits": 4, "group_size": None, "zero_shift": 0},
    "uniform, 4 bits, symmetric": {"bits": 4, "symmetric": True, "scale_dtype": "float16"},
    "uniform, 4 bits, inputs 6 bits": {"bits": 4, "activation": {"bits": 6, "symmetric": True}},
    "uniform, codebook E8P12": {"codebook": "E8P12", "seed_in": 7, "shares": "q", "tuned": False},
}


@pytest.mark.parametrize("text", SETTINGS)
def test_settings(text: str) -> None:
    assert settings({"format": "uniform", "shape": [1, 2]} | SETTINGS[text]) == text
