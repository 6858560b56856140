"""A block that rounds what its linears and attentions read, as it will when it runs.

OmniQuant (arXiv 2308.13137), section 4.1, quantizes so for W4A4 and W6A6.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from torch import Tensor, nn

from lowbit.blocks.attention import round_attention
from lowbit.kernels.tokens import round_tokens

Rounding = dict[str, Any]  # the arguments of `round_tokens` after the first


def rounding_copy(
    block: nn.Module, linears: Mapping[str, Rounding], attentions: Mapping[str, Rounding]
) -> nn.Module:
    """A copy of the block that has the very same parameters, but rounds.

    linears, attentions: those that round, by name. The block itself stays as it is.
    """
    twin = deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    for name, rounding in linears.items():
        twin.get_submodule(name).register_forward_pre_hook(partial(_rounded, rounding))
    for name, rounding in attentions.items():
        round_attention(twin.get_submodule(name), rounding)
    return twin


def _rounded(rounding: Rounding, linear: nn.Module, args: tuple[Tensor]) -> Tensor:
    return round_tokens(args[0], **rounding)
