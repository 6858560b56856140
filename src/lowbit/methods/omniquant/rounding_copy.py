"""A block that rounds what its linears and attentions read, as it will when it runs.

OmniQuant (arXiv 2308.13137), section 4.1, quantizes so for W4A4 and W6A6.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial

from torch import Tensor, nn

from lowbit.blocks.attention import round_attention
from lowbit.formats.activation import Activation


def rounding_copy(
    block: nn.Module, linears: Mapping[str, Activation], attentions: Mapping[str, Activation]
) -> nn.Module:
    """A copy of the block that has the very same parameters, but rounds.

    block: stays as it is.
    linears, attentions: those that round, by name, and how.
    """
    copy = deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    for name, rounding in linears.items():
        copy.get_submodule(name).register_forward_pre_hook(partial(_rounded, rounding))
    for name, rounding in attentions.items():
        round_attention(copy.get_submodule(name), rounding.model_dump())
    return copy


def _rounded(rounding: Activation, linear: nn.Module, args: tuple[Tensor]) -> Tensor:
    return rounding.round(args[0])
