"""Linears that do not depend on each other, dealt out to the processes that share a run."""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

import torch

from lowbit.formats import build
from lowbit.formats.base import QuantizedLinear
from lowbit.ranks import Ranks
from lowbit.run_report import LinearReport

L = TypeVar("L", bound=QuantizedLinear)


class Shared(Generic[L]):
    """Makes the quantized linears of a group, each in one process, and gives them to all.

    ranks: the processes.
    device: where layers are.
    make: makes a layer and its report, given the linear's name.
    """

    def __init__(
        self, ranks: Ranks, device: torch.device, make: Callable[[str], tuple[L, LinearReport]]
    ) -> None:
        self.ranks = ranks
        self.device = device
        self.make = make

    def each(
        self, costs: Mapping[str, float]
    ) -> Iterator[tuple[str, QuantizedLinear, LinearReport]]:
        """Yields name, layer and report of each linear. costs: by the linear's name, in order"""
        if self.ranks.count == 1 or len(costs) == 1:
            for name in costs:
                yield name, *self.make(name)
            return
        owners = self.ranks.assign(costs)
        own = {name: self.make(name) for name in costs if owners[name] == self.ranks.index}
        for name in costs:
            yield name, *self._received(own.get(name), owners[name])

    def _received(
        self, made: tuple[L, LinearReport] | None, source: int
    ) -> tuple[QuantizedLinear, LinearReport]:
        """Returns what process `source` has made. made: that, in this process"""
        layers = [] if made is None else [made]
        stated = self.ranks.value(
            lambda: [(layer.entry(), report.model_dump()) for layer, report in layers], source
        )
        tensors = self.ranks.tensors(
            lambda: {name: t for layer, _ in layers for name, t in layer.state_dict().items()},
            source,
        )
        if made is not None:
            return made
        [(entry, report)] = stated
        with torch.device("meta"):
            layer = build(entry)
        layer.load_state_dict({n: t.to(self.device) for n, t in tensors.items()}, assign=True)
        return layer, LinearReport.model_validate(report)
