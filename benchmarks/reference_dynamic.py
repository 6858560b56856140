"""MixedQuant as its original code computes it, for comparison only: no checkpoint can hold it.

- The order of the inputs is computed anew for each call from all its tokens. So a token changes the
  results of earlier tokens, and running tokens one by one gives other results than all at once.
- Weights are sorted in an order of their own, so that an integer product is impossible.
- Salient columns are part of their groups when scales are computed, and are restored afterwards.

Source: github.com/adithyab100/smoothquant-mixedprecision, fake_quant.py.
"""

from copy import deepcopy
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.blocks import BlockTask
from lowbit.blocks.folding import tensors_of
from lowbit.blocks.install import replace_module
from lowbit.blocks.statistics import input_statistics
from lowbit.methods import MixedQuant

SORTS = ("none", "max", "mean3std", "argmax")
LEAST = 1e-5  # lower limit of a group's largest value, as in the original


def fake_quantize_sorted(values: Tensor, sort: str, bits: int, group_size: int | None) -> Tensor:
    """Rounds values in groups of columns, which are sorted by these values.

    values: (rows, columns) -> the same shape
    sort: one of SORTS.
    bits: width of the symmetric grid, which does not use the lowest code.
    group_size: columns in a group; None: all.
    """
    rows, columns = values.shape
    order = _key(values, sort).argsort(stable=True)
    size = min(group_size or columns, columns)
    groups = functional.pad(values[:, order], (0, -columns % size)).view(rows, -1, size)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST) / (2 ** (bits - 1) - 1)
    rounded = (torch.round(groups / scale) * scale).flatten(1)[:, :columns]
    return torch.empty_like(values).index_copy_(1, order, rounded)


def _key(values: Tensor, sort: str) -> Tensor:
    size = values.abs()
    if sort == "max":
        return size.amax(0)
    if sort == "mean3std":
        return size.mean(0) + 3 * size.std(0, correction=0)
    return size.argmax(0) if sort == "argmax" else torch.zeros_like(size[0])


class ReferenceDynamicLinear(nn.Module):
    """A linear layer that rounds its input as the original code does; it refuses to be saved."""

    def __init__(
        self,
        linear: nn.Linear,
        salient: Tensor,
        *,
        sort: str,
        bits: int,
        activation_bits: int,
        group_size: int | None,
    ) -> None:
        """Rounds the weight of a linear.

        linear: the float layer.
        salient: (count,) int64, the inputs that stay float.
        sort, group_size: as in `fake_quantize_sorted`.
        bits: width of the weight's grid.
        activation_bits: width of the inputs' grid.
        """
        super().__init__()
        if sort not in SORTS:
            raise ValueError(
                f"sort is {sort}: the original code sorts weights and inputs each by its own "
                f"values; allowed are {', '.join(SORTS)}"
            )
        self.sort, self.bits, self.group_size = sort, activation_bits, group_size
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        self.weight = fake_quantize_sorted(weight, sort, bits, group_size)
        self.weight[:, salient] = weight[:, salient]
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        everything = torch.ones(linear.in_features, dtype=torch.bool, device=weight.device)
        everything[salient] = False
        self.ordinary = everything.nonzero().squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)"""
        rows = x.reshape(-1, self.in_features).float()
        rounded = fake_quantize_sorted(
            rows[:, self.ordinary], self.sort, self.bits, self.group_size
        )
        rows = rows.index_copy(1, self.ordinary, rounded)
        y = functional.linear(rows, self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def state_dict(self, *args: object, **kwargs: object) -> NoReturn:
        raise ValueError(
            "reference_dynamic is for comparison only: its result depends on the other tokens of "
            "a call, and cannot be saved; quantize with MixedQuant instead"
        )


def reference_dynamic(method: MixedQuant, task: BlockTask) -> nn.Module:
    """Returns the block as the original code runs it, with statistics of the task's first stream.

    The method's fields smooth, clip, rounding and salient_bits have no effect, since that code has
    no such settings.
    """
    stream = next(iter(task.streams.values()))
    statistics = input_statistics(task.block, task.groups, stream)
    made = deepcopy(task.block)
    for group in task.groups:
        here = method._common(task, group)
        ordered = here._ordered(task, group, tensors_of(task.block), statistics[group.name])
        for name in group.linears:
            linear = task.block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            dynamic = ReferenceDynamicLinear(
                linear,
                ordered.columns[len(ordered.columns) - ordered.order.salient :],
                sort=here.sort,
                bits=here.bits,
                activation_bits=here.activation_bits,
                group_size=here.group_size,
            )
            replace_module(made, name, dynamic)
    return made
