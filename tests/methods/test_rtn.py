from typing import Any

import pytest
import torch
import zoo

from lowbit.methods import RTN


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, None), (4, 20), (8, 128)])
def test_every_group_over_its_whole_range(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    """Group by group in plain arithmetic."""
    task = zoo.task("opt")
    result = RTN(bits=bits, group_size=group_size, symmetric=symmetric).quantize(task)
    for name, packed in result.linears.items():
        linear: Any = task.block.get_submodule(name)
        assert torch.equal(packed.bias, linear.bias)
        found, weight = packed.dequantize(), linear.weight
        size = group_size or weight.shape[1]
        for start in range(0, weight.shape[1], size):
            group = weight[:, start : start + size]
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            reach = 2 * torch.maximum(-low, high) if symmetric else high - low
            step = reach / (2**bits - 1)
            wrong = (found[:, start : start + size] - group).abs().amax(1) / step
            # Half a step; storing the scale in float16 moves the ends by half its last bit.
            assert float(wrong.max()) <= 0.5 + 2**bits * 2**-11
    assert set(result.report.linears) == set(result.linears)
    assert not result.tensors and not result.learned


def test_more_bits_make_less_noise() -> None:
    task = zoo.task("llama")
    noise = [
        RTN(bits=bits).quantize(task).report.linears["mlp.up_proj"].signal_to_noise_db
        for bits in range(2, 9)
    ]
    gains = [b - a for a, b in zip(noise, noise[1:], strict=False)]
    assert all(4 < gain < 9 for gain in gains)  # 6 decibels for each bit, more for the first
