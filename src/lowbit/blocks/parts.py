"""A loss of several parts that share their inputs, with one part's graph in memory at a time."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


def sum_of_parts(
    shared: Mapping[str, Tensor], parts: Callable[[Mapping[str, Tensor]], Iterator[Tensor]]
) -> Tensor:
    """sum(parts(shared)), where each part is backpropagated as soon as it is yielded.

    shared: what the parts have in common and need gradients through. parts: a generator of scalars;
    it is given the tensors cut off from their own graph. The result is a scalar whose gradient is
    that of the sum; without gradients it is the sum alone.
    """
    if not torch.is_grad_enabled():
        return torch.stack(list(parts(shared))).sum()
    leaves = {
        name: tensor.detach().requires_grad_() if tensor.requires_grad else tensor
        for name, tensor in shared.items()
    }
    values = []
    for part in parts(leaves):
        part.backward()
        values.append(part.detach())
    total = torch.stack(values).sum()
    for name, tensor in shared.items():
        gradient = leaves[name].grad
        if gradient is not None:  # nothing is added but the gradient
            total = total + ((tensor - tensor.detach()) * gradient).sum()
    return total
