"""The loss of a unit is the divergence of the model in which only that unit is sliced."""

import pytest
import quantized
import torch
import zoo
from torch import Tensor
from torch.nn import functional

import lowbit
from lowbit.allocate.sensitivity import sensitivity
from lowbit.formats.nested import NestedLinear

WIDTHS = (8, 4, 2)


def test_units_are_measured_one_at_a_time() -> None:
    model, _ = lowbit.load(quantized.folder(method="matquant"))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, NestedLinear)}
    units = [[m for n, m in layers.items() if end in n] for end in ("q_proj", "layers.1.mlp")]
    windows = list(zoo.tokens())
    lowbit.set_bits(model, 3)  # whatever it ran at before
    steps: list[tuple[int, int]] = []
    everything = [*units, [m for m in layers.values() if not any(m in unit for unit in units)]]
    found = sensitivity(model, everything, WIDTHS, windows, lambda *step: steps.append(step))
    assert steps[-1] == (len(steps), len(steps)) and len(steps) == 2 * (1 + 3 * 2)
    assert all(layer.bits == 8 for layer in layers.values())
    assert found[:, 0].tolist() == [0, 0, 0] and bool((found[:, 2] > found[:, 1]).all())
    expected = distribution(model, windows)
    for i, unit in enumerate(units):
        for layer in unit:
            layer.set_bits(2)
        wanted = functional.kl_div(
            distribution(model, windows), expected, log_target=True, reduction="sum"
        ) / sum(len(window) - 1 for window in windows)
        assert float(found[i, 2]) == pytest.approx(float(wanted), rel=1e-3)
        for layer in unit:
            layer.set_bits(8)


def distribution(model: torch.nn.Module, windows: list[Tensor]) -> Tensor:
    rows = [quantized.logits(model, window[None])[0, :-1] for window in windows]
    return torch.log_softmax(torch.cat(rows), -1)


def test_a_broken_model_is_refused() -> None:
    model, _ = lowbit.load(quantized.folder(method="matquant"))
    layers = [m for m in model.modules() if isinstance(m, NestedLinear)]
    layers[0].scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="are not numbers"):
        sensitivity(model, [layers], (8, 2), list(zoo.tokens()))
