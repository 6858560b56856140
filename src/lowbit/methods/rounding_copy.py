"""Make a float block round its activations as the quantized block will, for training.

Source: OmniQuant (arXiv 2308.13137), section 4.1 (W4A4 and W6A6).
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial

from torch import Tensor, nn

from lowbit.blocks.attention import round_attention
from lowbit.formats.activation import AttentionRounding
from lowbit.formats.reading import Reading


def rounding_copy(
    block: nn.Module, linears: Mapping[str, Reading], attentions: Mapping[str, AttentionRounding]
) -> nn.Module:
    """Returns a copy of the block that rounds its activations and shares the block's parameters.

    block: the block, which is not changed.
    linears: how linears read their inputs, by the linear's name.
    attentions: how queries, keys and values are rounded, by the attention's name.
    """
    copy = deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    for name, reading in linears.items():
        if reading.activation is not None:
            copy.get_submodule(name).register_forward_pre_hook(partial(_seen, reading))
    for name, rounding in attentions.items():
        round_attention(copy.get_submodule(name), rounding.settings())
    return copy


def _seen(reading: Reading, linear: nn.Module, args: tuple[Tensor]) -> Tensor:
    return reading.seen(args[0])
