"""What a method is: a frozen configuration that turns a block in float into a quantized one."""

import math
from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from lowbit.blocks import BlockResult, BlockTask
from lowbit.blocks.install import install
from lowbit.config import Config
from lowbit.formats.base import QuantizedLinear


class Method(Config):
    """A method IS its configuration; `name` is also the name of its file."""

    name: ClassVar[str]

    def streams(self) -> tuple[str, ...]:
        """The streams of hidden states that it needs; none: no calibration text."""
        return ()

    def rows(self) -> int:
        """How many calibration windows make one batch of a stream."""
        return 1

    @abstractmethod
    def quantize(self, task: BlockTask) -> BlockResult:
        """Chooses the numbers for one block; `task.block` stays as it is."""

    def install(self, block: nn.Module, result: BlockResult, stream: str) -> None:
        """Changes the block to what `stream` must pass through; "float" is left alone."""
        if stream != "float":
            install(block, result)

    def signature(self) -> dict[str, Any]:
        """Everything that shapes the result, as JSON values."""
        return {"name": self.name, **self.model_dump(mode="json")}


def signal_to_noise(weight: Tensor, linear: QuantizedLinear) -> float:
    """10 log10(|W|^2 / |W - dequantize()|^2), in decibels; inf for an exact copy.

    weight: (out, in) float32, the weight that was rounded.
    """
    noise = float((weight - linear.dequantize().to(weight.device)).square().sum())
    signal = float(weight.square().sum())
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
