"""Sum a loss over several parts while only one part's autograd graph is in memory."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


def sum_of_parts(
    shared: Mapping[str, Tensor], parts: Callable[[Mapping[str, Tensor]], Iterator[Tensor]]
) -> Tensor:
    """Returns sum(parts(shared)); each part is backpropagated as soon as it is yielded.

    shared: the tensors that all parts depend on, by name; gradients flow through them.
    parts: a generator of scalar losses. It is called with detached copies of `shared`.

    Returns a scalar that has the gradient of the whole sum; in torch.no_grad() the plain sum.
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
        if gradient is not None:  # adds the gradient and the value 0
            total = total + ((tensor - tensor.detach()) * gradient).sum()
    return total
