"""What OmniQuant and MatQuant share: fields, and from a block that was learned to its result."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lowbit.blocks import BlockTask
from lowbit.blocks.folding import load_changed
from lowbit.blocks.hessian import input_hessians
from lowbit.formats.base import QuantizedLinear
from lowbit.methods.method import Method
from lowbit.methods.result import BlockResult, too_few_tokens
from lowbit.run_report import BlockReport, LinearReport
from lowbit.solvers.block_learner import BlockLearner, Learning
from lowbit.solvers.gptq import OrderedFactor, ordered_factor
from lowbit.solvers.rounding import Grid

# (name, folded weight, folded bias, grid) -> the layer, and what is known of it
Pack = Callable[[str, Tensor, Tensor | None, Grid], tuple[QuantizedLinear, LinearReport]]
NEAREST_BETTER = "rounding to nearest was better than what was learned, and is kept"


class LearningMethod(Method):
    """lwc, let: what is learned, clips and scales. aug_loss: adds the error against the float block
    on the streams that rounded blocks hand on.

    epochs over all samples; batch: samples per step; lwc_lr, let_lr: AdamW's rates for logits, and
    for logarithms of scales and shifts; weight_decay: of both. alpha: of the initial scales. init:
    "minmax" as published, or "awq", a search for scales and clips so that a quarter of the epochs
    does. damping: share of a Hessian's mean diagonal that is added to it, where codes are chosen
    with feedback. min_tokens: an expert that saw fewer calibration tokens is rounded to nearest and
    named in the report.
    """

    learns: ClassVar[bool] = True

    lwc: bool = True
    let: bool = False
    aug_loss: bool = False
    epochs: int = Field(20, ge=0)
    batch: int = Field(1, ge=1)
    lwc_lr: float = Field(1e-2, gt=0)
    let_lr: float = Field(5e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    alpha: float = Field(0.5, ge=0, le=1)
    init: Literal["minmax", "awq"] = "minmax"
    damping: float = Field(0.01, gt=0)
    min_tokens: int = Field(64, ge=1)

    def windows_per_batch(self) -> int:
        return self.batch

    def learning(self, inputs: bool = False) -> Learning:
        """inputs: whether what the linears read is rounded too."""
        return Learning(
            lwc=self.lwc,
            let=self.let,
            lwc_lr=self.lwc_lr,
            let_lr=self.let_lr,
            alpha=self.alpha,
            init=self.init,
            inputs=inputs,
        )

    def fallbacks(self, tokens: Mapping[str, int]) -> dict[str, str]:
        """The linears that saw too few tokens, and the sentence for each.

        tokens: how many each linear saw.
        """
        few = {name: count for name, count in tokens.items() if count < self.min_tokens}
        return {name: too_few_tokens(count) for name, count in few.items()}

    def factors(
        self, task: BlockTask, learner: BlockLearner, shares: Mapping[str, float]
    ) -> dict[str, OrderedFactor]:
        """What feedback needs, by linear: Hessians of the inputs of the block after folding.

        shares: of each stream in their mean. Linears that saw too few tokens have none.
        """
        folded = deepcopy(task.block)
        load_changed(folded, learner.folded())
        mean: dict[str, Tensor] = {}
        enough = {group.name: group.linears for group in task.groups}
        for stream, share in shares.items():
            for group, found in input_hessians(folded, task.groups, task.streams[stream]).items():
                mean[group] = mean.get(group, 0.0) + share * found.matrix
                if found.tokens < self.min_tokens:
                    enough.pop(group, None)
        made: dict[str, OrderedFactor] = {}
        for group, linears in enough.items():
            factor = ordered_factor(mean[group], self.damping, True)
            if factor is not None:
                made |= dict.fromkeys(linears, factor)
        return made


@torch.no_grad()
def packed_block(learner: BlockLearner, pack: Pack) -> BlockResult:
    """The block with every linear packed and everything else that folding has changed."""
    tensors = learner.folded()
    result, reports = BlockResult(learned=learner.learned()), dict[str, LinearReport]()
    for name in learner.linears:
        weight = tensors.pop(f"{name}.weight")
        bias, grid = tensors.pop(f"{name}.bias", None), learner.grid(name, weight)
        result.linears[name], reports[name] = pack(name, weight, bias, grid)
    for name, tensor in tensors.items():
        if not torch.equal(tensor, learner.float_tensors[name]):
            result.tensors[name] = tensor
    result.report = BlockReport(linears=reports)
    return result


def keep_if_better(learner: BlockLearner, task: BlockTask, learned: float, nearest: float) -> bool:
    """Whether what was learned is as good as rounding to nearest; else it is forgotten."""
    keep = learned <= nearest
    if not keep:
        task.log.warn(NEAREST_BETTER)
        learner.forget()
    return keep
