"""Statistics of the inputs of linears, per channel, from one pass over a `Stream`, in float32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.blocks import LinearGroup, Stream
from lowbit.blocks.capture import observe_inputs
from lowbit.ranks import Ranks


@dataclass(kw_only=True)
class ChannelStatistics:
    """Statistics of the input x that a `LinearGroup` reads, for each channel.

    They are taken over all calibration tokens that the group's linears saw.

    absmax: (channels,) float32, the maximum of |x|.
    absmean: (channels,) float32, the mean of |x|.
    square: (channels,) float32, the mean of x^2.
    low, high: (channels,) float32, the minimum and maximum of x.
    position: (channels,) int64, the index in its sequence of the token with the largest |x|. An
        expert sees only the tokens routed to it, so there it is the index among the rows of one
        call.
    tokens: the number of tokens; with 0 tokens all statistics are 0.
    """

    absmax: Tensor
    absmean: Tensor
    square: Tensor
    low: Tensor
    high: Tensor
    position: Tensor
    tokens: int = 0

    def receive(self, ranks: Ranks, source: int, tokens: int) -> None:
        """Takes over the statistics of process `source`, which saw so many tokens."""
        self.tokens = tokens
        for name in ("absmax", "absmean", "square", "low", "high", "position"):
            values = getattr(self, name).contiguous()
            ranks.fill(values, source)
            setattr(self, name, values)

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> "ChannelStatistics":
        absmax, absmean, square, low, high = torch.zeros(5, channels, device=device)
        position = torch.zeros(channels, dtype=torch.int64, device=device)
        return cls(
            absmax=absmax, absmean=absmean, square=square, low=low, high=high, position=position
        )

    @property
    def deviation(self) -> Tensor:
        """Returns the standard deviation of |x| over tokens: (channels,) float32."""
        return (self.square - self.absmean.square()).clamp(min=0).sqrt()

    def divided(self, scale: Tensor) -> "ChannelStatistics":
        """Returns the statistics of x / scale.

        scale: (channels,), positive.
        """
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
        """Adds the tokens of one call.

        x: (..., tokens of a sequence, channels).
        """
        rows = x.reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        low, high = rows.amin(0), rows.amax(0)
        self.low = torch.minimum(self.low, low) if self.tokens else low
        self.high = torch.maximum(self.high, high) if self.tokens else high
        self.tokens += len(rows)
        share = len(rows) / self.tokens
        largest, token = rows.abs().max(0)
        position = token % x.shape[-2]
        self.position = torch.where(largest > self.absmax, position, self.position)
        self.absmax = torch.maximum(self.absmax, largest)
        self.absmean = self.absmean.lerp(rows.abs().mean(0), share)
        self.square = self.square.lerp(rows.square().mean(0), share)


def input_statistics(
    block: nn.Module, groups: Sequence[LinearGroup], stream: Stream
) -> dict[str, ChannelStatistics]:
    """Returns the statistics of the input of each `LinearGroup`, by the group's name."""
    first = {group.linears[0]: group.name for group in groups}
    gathered = no_statistics(block, groups)
    ranks = stream.ranks
    owners = ranks.assign({n: float(len(gathered[group].square)) for n, group in first.items()})
    observe_inputs(block, first, stream, lambda name, x: gathered[first[name]].update(x), owners)
    if ranks.count > 1:
        tokens = ranks.every({group: each.tokens for group, each in gathered.items()})
        for name, group in first.items():
            gathered[group].receive(ranks, owners[name], tokens[owners[name]][group])
    return gathered


def no_statistics(block: nn.Module, groups: Sequence[LinearGroup]) -> dict[str, ChannelStatistics]:
    """Returns statistics of 0 tokens for each `LinearGroup`, by the group's name."""
    empty: dict[str, ChannelStatistics] = {}
    for group in groups:
        module = block.get_submodule(group.linears[0])
        assert isinstance(module, nn.Linear)
        empty[group.name] = ChannelStatistics.empty(module.in_features, module.weight.device)
    return empty


def tokens_by_linear(
    groups: Sequence[LinearGroup], statistics: Mapping[str, ChannelStatistics]
) -> dict[str, int]:
    """Returns the number of tokens that each linear saw, by the linear's name.

    statistics: the statistics of each group's input, by the group's name.
    """
    return {name: statistics[group.name].tokens for group in groups for name in group.linears}
