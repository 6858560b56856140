import math

import pytest
import torch
from torch import nn

from lowbit.blocks import BlockResult, BlockTask
from lowbit.formats.uniform import UniformLinear
from lowbit.methods.method import Method, signal_to_noise


class Nothing(Method):
    name = "nothing"
    bits: int = 4

    def quantize(self, task: BlockTask) -> BlockResult:
        return BlockResult({})


def test_a_method_needs_no_text_unless_it_says_so() -> None:
    assert (Nothing().streams(), Nothing().rows()) == ((), 1)


def test_the_signature_names_method_and_options() -> None:
    assert Nothing(bits=3).signature() == {"name": "nothing", "bits": 3}


@pytest.mark.parametrize(("stream", "installed"), [("float", False), ("quantized", True)])
def test_only_the_float_stream_passes_the_block_as_it_was(stream: str, installed: bool) -> None:
    block, linear = nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.Linear(2, 2)
    Nothing().install(block, BlockResult({"a": linear}), stream)
    assert (block["a"] is linear) == installed


def packed(codes: list[list[int]], scale: float) -> UniformLinear:
    return UniformLinear.from_codes(
        torch.tensor(codes, dtype=torch.uint8),
        torch.full((len(codes), 1), scale),
        None,
        bits=4,
        group_size=None,
        symmetric=True,
    )


def test_signal_to_noise() -> None:
    linear = packed([[9, 8], [8, 6]], 0.5)  # 0.5, 0; 0, -1
    weight = linear.dequantize()
    assert signal_to_noise(weight, linear) == math.inf
    assert signal_to_noise(weight + 0.25, linear) == pytest.approx(
        10 * math.log10((0.75**2 + 0.25**2 * 2 + 0.75**2) / (4 * 0.25**2))
    )
    assert signal_to_noise(torch.zeros(2, 2), linear) == math.inf
