"""Inputs of linears to statistics per channel: one streaming pass over a block, in float32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.blocks import LinearGroup, Stream
from lowbit.blocks.capture import observe_inputs


@dataclass(kw_only=True)
class ChannelStatistics:
    """What a group's input looks like, channel by channel.

    absmax, absmean, square: (channels,) float32, maximum and mean of |x| and mean of x^2 over
    tokens. low, high: (channels,) float32, the extremes of x. position: (channels,) int64, the
    first token with that maximum, by its place in its sequence (for experts: among the tokens that
    came with it). tokens: how many were seen; 0 leaves all of them zero.
    """

    absmax: Tensor
    absmean: Tensor
    square: Tensor
    low: Tensor
    high: Tensor
    position: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> "ChannelStatistics":
        absmax, absmean, square, low, high = torch.zeros(5, channels, device=device)
        position = torch.zeros(channels, dtype=torch.int64, device=device)
        return cls(
            absmax=absmax, absmean=absmean, square=square, low=low, high=high, position=position
        )

    @property
    def deviation(self) -> Tensor:
        """The standard deviation of |x| over tokens: (channels,) float32."""
        return (self.square - self.absmean.square()).clamp(min=0).sqrt()

    def divided(self, scale: Tensor) -> "ChannelStatistics":
        """Those of x / scale.  scale: (channels,) positive."""
        return ChannelStatistics(
            absmax=self.absmax / scale,
            absmean=self.absmean / scale,
            square=self.square / scale.square(),
            low=self.low / scale,
            high=self.high / scale,
            position=self.position,
            tokens=self.tokens,
        )

    def update(self, x: Tensor) -> None:
        """x: (..., tokens of a sequence, channels)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        low, high = rows.amin(0), rows.amax(0)
        self.low = torch.minimum(self.low, low) if self.tokens else low
        self.high = torch.maximum(self.high, high) if self.tokens else high
        self.tokens += len(rows)
        share = len(rows) / self.tokens
        largest, token = rows.abs().max(0)
        place = token % x.shape[-2]
        self.position = torch.where(largest > self.absmax, place, self.position)
        self.absmax = torch.maximum(self.absmax, largest)
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
    observe_inputs(block, first, stream, lambda name, x: gathered[first[name]].update(x))
    return gathered


def tokens_by_linear(
    groups: Sequence[LinearGroup], statistics: Mapping[str, ChannelStatistics]
) -> dict[str, int]:
    """How many tokens each linear saw.  statistics: by the name of a group"""
    return {name: statistics[group.name].tokens for group in groups for name in group.linears}
