"""Make a float block round its activations as the quantized block will, for training.

Source: OmniQuant (arXiv 2308.13137), section 4.1 (W4A4 and W6A6).
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
    """Returns a copy of the block that rounds its activations and shares the block's parameters.

    block: the block, which is not changed.
    linears: how the inputs of linears are rounded, by the linear's name.
    attentions: how queries, keys and values are rounded, by the attention's name.
    """
    copy = deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    for name, rounding in linears.items():
        copy.get_submodule(name).register_forward_pre_hook(partial(_rounded, rounding))
    for name, rounding in attentions.items():
        round_attention(copy.get_submodule(name), rounding.model_dump())
    return copy


def _rounded(rounding: Activation, linear: nn.Module, args: tuple[Tensor]) -> Tensor:
    return rounding.round(args[0])
