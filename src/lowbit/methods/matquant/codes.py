"""Learn the codes of a master by the loss of all widths together."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from lowbit.blocks import BlockTask
from lowbit.blocks.folding import Tensors
from lowbit.blocks.parts import sum_of_parts
from lowbit.blocks.training import Fit
from lowbit.kernels.slicing import MASTER_BITS
from lowbit.methods.learned_rounding import LearnedRounding
from lowbit.methods.matquant.loss import Loss
from lowbit.methods.matquant.master import Master
from lowbit.methods.matquant.slices import master_codes
from lowbit.solvers.learned_rounding import RoundedWeight


def learn_master(
    method: LearnedRounding,
    task: BlockTask,
    weights: Mapping[str, RoundedWeight],
    packed: Master,
    loss: Loss,
) -> Fit:
    """Learns the codes of the weights, which are changed.

    weights: by the name of the linear.
    packed: the master with the codes that are not learned.
    """
    current = packed

    def parts() -> Tensors:
        nonlocal current
        current = _with_codes(packed, weights)
        return current.parts()

    def of_batch(index: int, tensors: Tensors) -> Tensor:
        def terms(parts: Mapping[str, Tensor]) -> Iterator[Tensor]:
            return loss.terms(index, lambda width: current.at(width, parts))

        return sum_of_parts(tensors, terms)

    # A weight moves by steps of the narrowest slice.
    unit = float(2 ** (MASTER_BITS - min(loss.weights)))
    return method.learn_codes(task, weights, parts, of_batch, loss.batches, unit)


def _with_codes(packed: Master, weights: Mapping[str, RoundedWeight]) -> Master:
    """Returns the master with the present codes of the weights, differentiable in these."""
    grids = {name: weight.grid for name, weight in weights.items()}
    values = {f"{name}.weight": weight.weight for name, weight in weights.items()}
    codes = {name: master_codes(weight.weight, grids[name]) for name, weight in weights.items()}
    return replace(
        packed,
        tensors=packed.tensors | values,
        grids={**packed.grids, **grids},
        codes={**packed.codes, **codes},
    )
