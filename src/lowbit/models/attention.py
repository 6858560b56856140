"""transformers' attention interface: which modules call it, and functions that round for them.

Importing this registers "lowbit-sdpa" and "lowbit-eager": transformers' own functions, behind the
rounding that a module's mark asks for (`lowbit.blocks.attention`); unmarked modules get just these.
Each is registered with the mask function of its own kind: without one transformers makes no mask
at all, and padded batches go silently wrong.
"""

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lowbit.blocks.attention import MARK, PREFIX, WRAPPED, round_attention
from lowbit.kernels.tokens import round_tokens

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the table that a forward looks its function up in


def _attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query: (batch, heads, tokens, width)  key, value: (batch, key heads, all tokens, width)"""
    rounding = getattr(module, MARK, None)
    if rounding is not None:
        query, key, value = (round_tokens(t, **rounding) for t in (query, key, value))
    if implementation == "sdpa":
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    # Every model's file has its own, with what sdpa lacks: a soft cap, sinks.
    eager: Any = sys.modules[type(module).__module__]
    attended: tuple[Tensor, Tensor | None] = eager.eager_attention_forward(
        module, query, key, value, *args, **kwargs
    )
    return attended


for _name in WRAPPED:
    AttentionInterface.register(PREFIX + _name, partial(_attend, _name))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def calls_interface(module: nn.Module) -> bool:
    """Whether the module hands its queries, keys and values to transformers' interface.

    Read off its forward, so that no weights are needed. False for Falcon's attention, which calls
    torch itself, and for all that is no attention.
    """
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and INTERFACE in code.co_names


def attentions_of(block: nn.Module) -> tuple[str, ...]:
    """Names of the modules of a block whose queries, keys and values can be rounded."""
    return tuple(name for name, module in block.named_modules() if calls_interface(module))


def round_attentions(model: nn.Module, roundings: Mapping[str, dict[str, Any]]) -> None:
    """Marks the attentions of a whole model, by their names in memory, as config.json asks.

    Raises ValueError by the name of one that is not there, or that cannot be rounded.
    """
    for name, rounding in roundings.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"config.json rounds what attention {name} reads, which this model does not have"
            ) from None
        if not calls_interface(module):
            raise ValueError(
                f"config.json rounds what attention {name} reads, which is a "
                f"{type(module).__name__} that does not call transformers' attention interface"
            )
        round_attention(module, rounding)
