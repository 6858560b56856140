"""Begin with what an earlier run learned for a block.

Training continues from these values; with 0 epochs they are used as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.blocks import BlockTask


class Start:
    """The learned tensors of an earlier run (`BlockTask.start`), taken one by one.

    It checks that every tensor has the expected shape and that all of them are used.
    """

    def __init__(self, task: BlockTask) -> None:
        self.tensors = dict(task.start)
        self.device = next(task.block.parameters()).device
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Returns a float32 copy of a tensor, or None if the earlier run did not learn it.

        Raises ValueError if its shape is not `shape`.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        self.used.add(name)
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"the earlier run learned {name} with shape {list(tensor.shape)}, "
                f"but these settings need {list(shape)}: use the same model, group_size and other "
                "fields of the method as the earlier run"
            )
        return tensor.to(self.device, torch.float32, copy=True)

    def check_used(self) -> None:
        """Raises ValueError if the earlier run learned tensors that nobody has taken."""
        unused = sorted(self.tensors.keys() - self.used)
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise ValueError(
                f"the earlier run learned {unused[0]}{more}, which these settings do "
                "not learn: use the same fields of the method as the earlier run"
            )
