"""What a model adds to the hidden states between two blocks.

Some models add features of images after their first blocks (Qwen3-VL). The difference belongs to
one batch, and does not depend on the hidden states: it is kept in the keyword arguments of the
block before it, under ADDED, and added to the output of that block.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit.blocks.stream import Batch

ADDED = "added"  # no argument of a block


def with_added(calls: list[Batch]) -> list[Batch]:
    """Returns the calls of all blocks in one forward pass with what is added between them.

    calls: of stubs, each of which returned its input.
    """
    made = []
    for index, call in enumerate(calls):
        after = calls[index + 1].hidden if index + 1 < len(calls) else call.hidden
        same = after is call.hidden or torch.equal(after, call.hidden)
        own = {} if same else {ADDED: after - call.hidden}
        made.append(Batch(call.hidden, call.kwargs | own))
    return made


def take_added(kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Returns the arguments of a block, and what is added to its output; None: nothing."""
    return {k: v for k, v in kwargs.items() if k != ADDED}, kwargs.get(ADDED)
