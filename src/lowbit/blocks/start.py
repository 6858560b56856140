"""What an earlier run learned for a block: training begins there; with no epochs it is replayed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.blocks import BlockTask


class Start:
    """`BlockTask.start`, asked for by name. Everything in it must be used and must fit."""

    def __init__(self, task: BlockTask) -> None:
        self.block = task.name
        self.tensors = dict(task.start)
        self.device = next(task.block.parameters()).device
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """A float32 copy of what was learned, or None. ValueError for another shape."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        self.used.add(name)
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{self.block}: what was learned for {name} has shape {list(tensor.shape)}, these "
                f"settings need {list(shape)}: use the model, groups and fields of the earlier run"
            )
        return tensor.to(self.device, torch.float32, copy=True)

    def check_used(self) -> None:
        """ValueError for what these settings do not learn."""
        rest = sorted(self.tensors.keys() - self.used)
        if rest:
            raise ValueError(
                f"{self.block}: the earlier run learned {rest[0]} ({len(rest)} such), which these "
                "settings do not learn: use the fields of the earlier run"
            )
