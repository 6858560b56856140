"""Inputs of linears to statistics per channel: one streaming pass over a block, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.blocks import LinearGroup, Stream
from lowbit.blocks.capture import call_block, observed


@dataclass
class ChannelStatistics:
    """What a group's input looks like, channel by channel.

    absmax, absmean, square: (channels,) float32, maximum and mean of |x| and mean of x^2 over
    tokens. tokens: how many were seen; 0 leaves all of them zero.
    """

    absmax: Tensor
    absmean: Tensor
    square: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> "ChannelStatistics":
        absmax, absmean, square = torch.zeros(3, channels, device=device)
        return cls(absmax, absmean, square)

    def update(self, x: Tensor) -> None:
        """x: (..., channels)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        self.tokens += len(rows)
        share = len(rows) / self.tokens
        self.absmax = torch.maximum(self.absmax, rows.abs().amax(0))
        self.absmean = self.absmean.lerp(rows.abs().mean(0), share)
        self.square = self.square.lerp(rows.square().mean(0), share)


def input_statistics(
    block: nn.Module, groups: Sequence[LinearGroup], stream: Stream
) -> dict[str, ChannelStatistics]:
    """The statistics of every group's input, by the group's name."""
    first = {group.linears[0]: group.name for group in groups}
    gathered: dict[str, ChannelStatistics] = {}
    for linear, group in first.items():
        module = block.get_submodule(linear)
        assert isinstance(module, nn.Linear)
        gathered[group] = ChannelStatistics.empty(module.in_features, module.weight.device)
    with torch.no_grad(), observed(block, first, lambda n, x: gathered[first[n]].update(x)):
        for batch in stream:
            call_block(block, batch)
    return gathered
