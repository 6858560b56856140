"""Trellis codes as a method: more bits lose less, and less than QuIP#'s lattice at equal bits."""

from functools import cache
from typing import Any

import pytest
import torch
import zoo

from lowbit.formats.trellis.codebook import RATES
from lowbit.methods import METHODS, QuIP
from lowbit.methods.result import BlockResult
from lowbit.methods.trellis import Trellis

pytestmark = [pytest.mark.slow, pytest.mark.kernels]

QUICK: dict[str, Any] = {"state_bits": 9, "min_tokens": 8, "match": "self"}


@cache
def by_rate(rate: float) -> BlockResult:
    return Trellis(**QUICK, rate=rate, row_scale="never").quantize(zoo.task("llama"))


def losses(result: BlockResult) -> list[float]:
    return [linear.proxy_loss for linear in result.report.linears.values()]


def test_more_bits_lose_less() -> None:
    """By about 6 dB each; a Gaussian without feedback would lose 4**-rate and a little more."""
    means = [sum(losses(by_rate(rate))) / 7 for rate in RATES]
    for rate, mean in zip(RATES, means, strict=True):
        assert 0.2 * 4.0**-rate < mean < 1.4 * 4.0**-rate
    for worse, better in zip(RATES, RATES[1:], strict=False):
        for more, less in zip(losses(by_rate(worse)), losses(by_rate(better)), strict=True):
            assert less < more * 4.0 ** (worse - better) * 1.4


def test_it_loses_less_than_a_lattice_of_equal_bits() -> None:
    lattice = QuIP(min_tokens=8, match="self", row_scale="never").quantize(zoo.task("llama"))
    assert sum(losses(with_more_states())) < 0.95 * sum(losses(lattice))


@cache
def with_more_states() -> BlockResult:
    method = Trellis(**QUICK | {"state_bits": 12}, rate=2.0, row_scale="never")
    return method.quantize(zoo.task("llama"))


def test_more_states_lose_less() -> None:
    assert sum(losses(with_more_states())) < 0.95 * sum(losses(by_rate(2.0)))


@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_padding_of_odd_widths_counts_and_changes_nothing(rate: float) -> None:
    """Rows and columns beyond the weight are free to be anything."""
    task = zoo.task("llama")
    result = Trellis(**QUICK, rate=rate).quantize(task)
    for name, layer in result.linears.items():
        rows, columns = task.block.get_submodule(name).weight.shape
        tiles = -(-rows // 16) * -(-columns // 16)
        assert layer.packed.numel() == 32 * rate * tiles
        assert layer.dequantize().shape == (rows, columns)


def test_dead_inputs_and_empty_weights_are_finite() -> None:
    task = zoo.task("llama")
    with torch.no_grad():
        task.block.input_layernorm.weight[::2] = 0
        task.block.self_attn.k_proj.weight.zero_()
        task.block.self_attn.v_proj.weight[3] = 0
    result = Trellis(**QUICK, rate=3.0).quantize(task)
    assert all(layer.dequantize().isfinite().all() for layer in result.linears.values())
    assert not result.linears["self_attn.k_proj"].dequantize().any()


def test_rates_by_linear() -> None:
    overrides = {"down_proj": {"rate": 4.0}, "self_attn.*": {"rate": 1.5, "row_scale": "always"}}
    result = Trellis(**QUICK, rate=2.0, overrides=overrides).quantize(zoo.task("llama"))
    rates = {name: layer.entry()["rate"] for name, layer in result.linears.items()}
    assert rates["mlp.down_proj"] == 4 and rates["mlp.up_proj"] == 2
    assert rates["self_attn.q_proj"] == 1.5
    assert result.linears["self_attn.q_proj"].entry()["scale"] == "row"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 3.5}, "rate is 3.5: allowed are 1, 1.5, 2"),
        ({"rate": 0}, "rate"),
        ({"state_bits": 8}, "state_bits"),
        ({"state_bits": 17}, "state_bits"),
        ({"codebook": "E8P12"}, "'codebook' is not a field of"),
        ({"overrides": {"q_proj": {"seed": 1}}}, "'seed' is not a field that trellis can have"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS["trellis"](**options)
