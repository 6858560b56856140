"""From a block whose parameters were learned to its result: what OmniQuant and MatQuant share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.blocks import BlockResult, BlockTask, Event
from lowbit.blocks.statistics import ChannelStatistics
from lowbit.blocks.training import Fit
from lowbit.formats.base import QuantizedLinear
from lowbit.methods.method import signal_to_noise
from lowbit.solvers.block_learner import BlockLearner
from lowbit.solvers.rounding import Grid

# (name, folded weight, folded bias, grid) -> the layer
Pack = Callable[[str, Tensor, Tensor | None, Grid], QuantizedLinear]


@torch.no_grad()
def packed_block(learner: BlockLearner, pack: Pack) -> BlockResult:
    """The block with every linear packed and everything else that folding has changed."""
    tensors = learner.folded()
    result = BlockResult({}, learned=learner.learned(), report={"linears": {}})
    for name in learner.linears:
        weight = tensors.pop(f"{name}.weight")
        bias, grid = tensors.pop(f"{name}.bias", None), learner.grid(name, weight)
        packed = pack(name, weight, bias, grid)
        result.linears[name] = packed
        error = signal_to_noise(weight, packed)
        result.report["linears"][name] = {"signal_to_noise_db": round(error, 2)}
    for name, tensor in tensors.items():
        if not torch.equal(tensor, learner.float_tensors[name]):
            result.tensors[name] = tensor
    return result


def keep_if_better(learner: BlockLearner, task: BlockTask, learned: float, nearest: float) -> bool:
    """Whether what was learned is as good as rounding to nearest; else it is forgotten."""
    keep = learned <= nearest
    if not keep:
        task.log(Event("warning", {"text": f"{task.name}: rounding to nearest was better"}))
        learner.forget()
    return keep


def training_report(
    fitted: Fit,
    nearest: float,
    keep: bool,
    starved: Mapping[str, int],
    statistics: Mapping[str, ChannelStatistics],
) -> dict[str, Any]:
    """nearest: the loss of rounding to nearest. keep: whether what was learned is used."""
    report: dict[str, Any] = {"training": fitted.report(), "loss_rtn": nearest}
    report["loss_before"], report["loss_after"] = fitted.before, fitted.after
    tokens = {name: seen.tokens for name, seen in statistics.items()}
    if len(set(tokens.values())) > 1:
        report["tokens"] = tokens
    if starved:
        report["rounded_to_nearest"] = dict(starved)
    if not keep:
        report["loss_after"] = nearest
        report["fell_back"] = "nothing learned was better than rounding to nearest"
    return report
