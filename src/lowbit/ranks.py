"""Several processes that compute one result, and what they tell each other.

All processes run the same code. Batches of windows are dealt out in turn: batch i belongs to
process i % count, which alone computes with it. What is made of all batches, such as a sum, is made
of them in their order, so that any number of processes computes the same bits. `Ranks` is a process
that is alone; `lowbit.together` has those that torchrun starts.
"""

import platform
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit.device import device_kind

Key = TypeVar("Key", bound=Hashable)
NOBODY = -1  # stands for the number of a process that receives a tensor
CPUS = Path("/proc/cpuinfo")


class Ranks:
    """One process of several. Here it is the only one; `lowbit.together.Together` has others.

    Every process must call the methods in the same order. Values are what JSON can hold.

    index: the number of this process, from 0.
    count: the number of processes.
    """

    index = 0
    count = 1

    def owner(self, batch: int) -> int:
        """Returns the number of the process that a batch belongs to."""
        return batch % self.count

    def has(self, batch: int) -> bool:
        """Returns whether a batch belongs to this process."""
        return self.owner(batch) == self.index

    def own(self, batches: int) -> range:
        """Returns the indices of this process's batches. batches: the number of all batches"""
        return range(self.index, batches, self.count)

    def assign(self, costs: Mapping[Key, float]) -> dict[Key, int]:
        """Deals out jobs, the costliest first, each to the process that has the least to do.

        costs: the cost of each job.

        Returns the number of a process for each job.
        """
        load = [0.0] * self.count
        found = {}
        for key, cost in sorted(costs.items(), key=lambda item: -item[1]):
            found[key] = load.index(min(load))
            load[found[key]] += cost
        return {key: found[key] for key in costs}

    def every(self, value: Any) -> list[Any]:
        """Returns the values of all processes, in their order."""
        return [value]

    def value(self, make: Callable[[], Any], source: int = 0) -> Any:
        """Returns what one process makes.

        make: called in process `source` alone.
        """
        return make()

    def tensors(
        self, make: Callable[[], Mapping[str, Tensor]], source: int = 0
    ) -> Mapping[str, Tensor]:
        """Returns tensors by name, on the CPU, that one process makes, as `value` does."""
        return make()

    def lists(
        self,
        own: Sequence[Tensor],
        device: torch.device,
        receivers: Sequence[Sequence[int | None]],
    ) -> list[Sequence[Tensor | None]]:
        """Returns the tensors of all processes, in their order; None for what is not received.

        device: where the tensors are.
        receivers: for each tensor of each process the one that receives it; None: all do.
        """
        return [own]

    def fill(self, tensor: Tensor, source: int) -> None:
        """Overwrites a contiguous tensor by that of process `source`, which has the same shape."""

    def losses(self, batches: Sequence[int], compute: Callable[[int], float]) -> list[float]:
        """Returns compute(batch) of each batch, which the process that it belongs to calls."""
        values = [iter(part) for part in self.every([compute(i) for i in batches if self.has(i)])]
        return [next(values[self.owner(i)]) for i in batches]

    def in_turn(
        self,
        batches: int,
        compute: Callable[[int], tuple[Any, Sequence[Tensor]]],
        device: torch.device,
        receivers: Callable[[int, Any], Sequence[int | None]] = lambda batch, value: [],
    ) -> Iterator[tuple[Any, Sequence[Tensor | None]]]:
        """Yields compute(batch) of each batch, which the process that it belongs to calls.

        compute: returns a value, and tensors on `device`.
        receivers: given a batch and its value, returns the process that receives each tensor; the
            others get None instead. If it returns nothing, all get all tensors.
        """
        for first in range(0, batches, self.count):
            number = first + self.index
            value, tensors = compute(number) if number < batches else (None, [])
            values = self.every(value)[: batches - first]
            wanted = [receivers(first + i, each) for i, each in enumerate(values)]
            yield from zip(values, self.lists(tensors, device, wanted), strict=False)


ALONE = Ranks()


def processor(device: torch.device) -> str:
    """Returns the name of the processor of a device, such as "NVIDIA H200".

    On another processor the same computation may end in other bits.
    """
    if device.type == "cpu":
        text = CPUS.read_text() if CPUS.exists() else ""
        lines = (line.partition(":") for line in text.splitlines())
        names = [name.strip() for key, _, name in lines if key.strip() == "model name"]
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{names[0] if names else platform.machine()}, {capability}"
    return device_kind(device)
