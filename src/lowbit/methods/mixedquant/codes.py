"""Learn the codes of a block's sorted linears by the error of the block's output."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lowbit.blocks import BlockTask
from lowbit.blocks.capture import call_block
from lowbit.blocks.folding import Tensors
from lowbit.blocks.training import mean_loss
from lowbit.formats import link
from lowbit.formats.sorted_group import SortedGroupLayout, SortedGroupLinear
from lowbit.methods.learned_rounding import LearnedRounding
from lowbit.methods.mixedquant.groups import OrderedGroup
from lowbit.methods.result import BlockResult, signal_to_noise, trained_report
from lowbit.solvers.learned_rounding import RoundedWeight
from lowbit.solvers.rounding import Grid


class _Sorted:
    """One sorted linear whose codes are learned; the columns of salient inputs stay as they are.

    layer: the linear as it was packed.
    ordered: its group.
    """

    def __init__(self, layer: SortedGroupLinear, ordered: OrderedGroup) -> None:
        kept, spec = ordered.kept, layer.spec
        values = layer.ordered()
        grid = Grid(layer.scale.float(), None, bits=spec.bits, group_size=spec.group_size)
        self.weight = RoundedWeight(values[:, :kept], grid, layer.scale.dtype)
        self.salient = values[:, kept:]
        self.layer = layer
        self.order = ordered.order

    def value(self) -> Tensor:
        """Returns the weight (out, in) in the order of the input, differentiable."""
        values = torch.cat([self.weight.value(), self.salient], 1)
        permutation = self.order.permutation
        return values if permutation is None else values[:, permutation.argsort()]

    @torch.no_grad()
    def packed(self) -> SortedGroupLinear:
        """Returns a layer with the learned codes."""
        spec, layer = self.layer.spec, self.layer
        bits = 8 if spec.salient_dtype == "int8" else 16
        layout = SortedGroupLayout(self.order, spec.bits, bits, spec.shares)
        weight = torch.cat([self.weight.weight, self.salient], 1)
        return SortedGroupLinear.from_grid(weight, self.weight.grid.scale, layout, bias=layer.bias)


def learn_codes(
    method: LearnedRounding,
    task: BlockTask,
    groups: Mapping[str, OrderedGroup],
    tensors: Tensors,
    result: BlockResult,
) -> None:
    """Learns the codes of linears of a packed block, and puts layers with them into the result.

    groups: the group of each linear whose codes are learned, by the linear's name.
    tensors: the block's float tensors, with columns in the order of the input.
    """
    layers = {n: x for n, x in result.linears.items() if isinstance(x, SortedGroupLinear)}
    learned = {name: _Sorted(layers[name], ordered) for name, ordered in groups.items()}
    fixed = tensors | {f"{name}.weight": layer.dequantize() for name, layer in layers.items()}
    loss, batches = _loss(task, layers), len(task.streams["quantized"])
    fitted = method.learn_codes(
        task,
        {name: each.weight for name, each in learned.items()},
        lambda: fixed | {f"{name}.weight": each.value() for name, each in learned.items()},
        loss,
        batches,
    )
    with torch.no_grad():
        after = fixed | {f"{name}.weight": each.value() for name, each in learned.items()}
    result.linears |= {name: each.packed() for name, each in learned.items()}
    link(result.linears)
    reports = dict(result.report.linears)
    for name in learned:
        decibels = signal_to_noise(tensors[f"{name}.weight"], result.linears[name])
        reports[name] = reports[name].with_learned_codes(decibels)

    def mean(tensors: Tensors) -> float:
        return mean_loss(lambda index: loss(index, tensors), batches, task.ranks)

    result.report = trained_report(reports, fitted, None, mean(after), [], mean(fixed))


def _loss(
    task: BlockTask, layers: Mapping[str, SortedGroupLinear]
) -> Callable[[int, Tensors], Tensor]:
    """Returns the function of the error of a batch, given its index and the block's tensors."""
    targets = task.streams["float"].map(lambda batch: call_block(task.block, batch))
    block = deepcopy(task.block, {id(p): p for p in task.block.parameters()})
    for name, layer in layers.items():
        if layer.spec.activation is not None:
            hook = partial(_rounded, layer)
            block.get_submodule(name).register_forward_pre_hook(hook)

    def loss(index: int, tensors: Tensors) -> Tensor:
        batch = task.streams["quantized"][index]
        out = functional_call(block, tensors, (batch.hidden,), dict(batch.kwargs))
        out = out[0] if isinstance(out, tuple) else out
        return functional.mse_loss(out, targets[index].hidden)

    return loss


def _rounded(layer: SortedGroupLinear, linear: nn.Module, args: tuple[Tensor]) -> Tensor:
    """Rounds an input as the layer does, with the gradient of the identity."""
    with torch.no_grad():
        rounded = layer.quantized_input(args[0])
    return args[0] + (rounded - args[0]).detach()
