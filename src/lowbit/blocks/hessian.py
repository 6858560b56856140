"""H = E[x x^T] of every group's input: one streaming pass, one matrix per group."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.blocks import LinearGroup, Stream
from lowbit.blocks.capture import call_block, observed

MOST_IN_MEMORY = 4 * 2**30  # bytes of accumulators; above that they live on disk


@dataclass(frozen=True)
class Hessian:
    """matrix: (n, n) float32, the mean over tokens of x x^T. tokens: how many there were."""

    matrix: Tensor
    tokens: int


class _Sum:
    """A running sum of x x^T: float32 products batch by batch, added up in float64."""

    def __init__(self, channels: int, file: Path | None) -> None:
        shape = (channels, channels)
        if file is None:
            self.total = torch.zeros(shape, dtype=torch.float64)
        else:
            flat = torch.from_file(
                str(file), shared=True, size=channels * channels, dtype=torch.float64
            )
            self.total = flat.view(shape)
            self.total.zero_()
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if len(rows):
            self.tokens += len(rows)
            self.total += (rows.T @ rows).to(self.total.device, torch.float64)


def input_hessians(
    block: nn.Module, groups: Sequence[LinearGroup], stream: Stream, folder: Path | None = None
) -> dict[str, Hessian]:
    """The Hessian of every group's input, by the group's name.

    folder: where accumulators go when they are larger than MOST_IN_MEMORY together.
    """
    first = {group.linears[0]: group.name for group in groups}
    widths = {name: _in_features(block, name) for name in first}
    on_disk = folder is not None and sum(8 * n * n for n in widths.values()) > MOST_IN_MEMORY
    sums = {
        first[name]: _Sum(n, folder / f"{first[name]}.f64" if folder and on_disk else None)
        for name, n in widths.items()
    }
    with torch.no_grad(), observed(block, first, lambda name, x: sums[first[name]].update(x)):
        for batch in stream:
            call_block(block, batch)
    device = next(block.parameters()).device
    return {
        name: Hessian((s.total / max(s.tokens, 1)).to(device, torch.float32), s.tokens)
        for name, s in sums.items()
    }


def _in_features(block: nn.Module, name: str) -> int:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module.in_features
