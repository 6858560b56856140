"""One linear of PTQ1.61: its signs and scales, its 4-bit columns, and the layer made of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats.binary import BinaryLinear, Salient
from lowbit.methods.matching import Step
from lowbit.methods.ptq161.factored import FactoredLinear
from lowbit.solvers.correction import Target
from lowbit.solvers.gptq import OrderedFactor, gptq_codes
from lowbit.solvers.rounding import Grid, minmax_grid

SALIENT_BITS = 4


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What linears of a group share if they have the same number of salient channels.

    owner: the name of the first of them, whose layer stores the mask.
    mask: (in,) bool, the salient channels.
    square: (in,), the mean square of each input; None after too few calibration tokens.
    step: what was measured of the input; None: nothing, or of too few tokens.
    gain, factor: for refit_salient, from `refit_gain` and `ordered_factor`; None: no refitting.
    """

    owner: str
    mask: Tensor
    square: Tensor | None
    step: Step | None = None
    gain: Tensor | None = None
    factor: OrderedFactor | None = None


@dataclass(frozen=True)
class Approximated:
    """A linear of the block while its scales are learned.

    target: what its weight was approximated for.
    salient: the salient weights; None if no channel is salient.
    learns: whether its scales are learned.
    """

    factored: FactoredLinear
    target: Target
    salient: Salient | None
    shared: Shared
    learns: bool


def rounded_salient(weight: Tensor, error: Tensor, shared: Shared) -> Salient:
    """Rounds the salient weights to four bits; each row's range is that of these columns alone.

    weight: (out, salient), the salient weights.
    error: (out, plain), the error of the binary weights, for refit_salient.
    """
    if shared.gain is not None:
        weight = weight + error @ shared.gain
    grid = minmax_grid(weight, SALIENT_BITS, None, symmetric=False)
    assert grid.zero is not None
    channels = shared.mask.nonzero().squeeze(1)
    nearest = Salient.nearest(channels, weight, grid.scale.squeeze(1), grid.zero.squeeze(1))
    if shared.factor is None:
        return nearest
    scale = nearest.scale.float().unsqueeze(1)
    stored = Grid(scale, grid.zero, bits=SALIENT_BITS, group_size=None)
    codes, _ = gptq_codes(weight, stored, shared.factor)
    return replace(nearest, codes=codes)


def packed(name: str, linear: Approximated, as_learned: bool = True) -> BinaryLinear:
    """Returns the layer. as_learned: whether it has the learned scales; False: the initial ones."""
    factored, shared, first = linear.factored, linear.shared, linear.factored.binary
    row, column = first.row, first.column
    if as_learned:
        row, column = factored.row().detach(), factored.column().detach()
    return BinaryLinear.from_parts(
        first.negative,
        row,
        row_mean=first.mean if first.mean.any() else None,
        column_scale=None if bool((column == 1).all()) else column,
        salient=linear.salient,
        shares=None if name == shared.owner or linear.salient is None else shared.owner,
        bias=factored.bias,
    )


def learned(name: str, linear: Approximated) -> dict[str, Tensor]:
    """Returns the learned tensors of a linear by name, from which a later run can start."""
    factored = linear.factored
    tensors = {f"{name}.row_log": factored.row_log.detach()}
    tensors[f"{name}.column_log"] = factored.column_log.detach()
    if name == linear.shared.owner:
        tensors[f"{name}.mask"] = linear.shared.mask.to(torch.uint8)
    return tensors
