"""Rounds queries, keys and values through transformers' attention interface.

Importing this module registers two attention functions with transformers, "lowbit-sdpa" and
"lowbit-eager". They round queries, keys and values if the attention module is marked for it
(`lowbit.blocks.attention`), and then call transformers' own function "sdpa" or "eager". If the mark
says so, they rotate each head before they round it, and what attention makes of values back.

Each is registered with the mask function of "sdpa" or "eager" as well. Without one, transformers
makes no mask at all, and the results of padded batches are wrong without any error.
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
from lowbit.kernels.heads import restore_heads, rotate_heads
from lowbit.kernels.tokens import round_tokens

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # transformers' table of attention functions


def _attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Rounds as the module's mark asks, then calls transformers' function `implementation`.

    query: (batch, heads, tokens, width)
    key, value: (batch, key heads, all tokens, width)
    """
    attend: Any = sdpa_attention_forward
    if implementation == "eager":
        # Each model's file has its own eager function, with what sdpa lacks: soft caps, sinks.
        attend = sys.modules[type(module).__module__].eager_attention_forward
    rounding, seed, values = dict(getattr(module, MARK, {})), None, False
    if rotation := rounding.pop("rotation", None):
        seed, values = rotation["seed"], rotation["values"]
    if seed is not None:
        query, key = rotate_heads(query, seed), rotate_heads(key, seed)
        value = rotate_heads(value, seed) if values else value
    if rounding:
        query, key, value = (round_tokens(t, **rounding) for t in (query, key, value))
    attended: tuple[Tensor, Tensor | None] = attend(module, query, key, value, *args, **kwargs)
    if seed is not None and values:
        return restore_heads(attended[0], seed), attended[1]
    return attended


for _name in WRAPPED:
    AttentionInterface.register(PREFIX + _name, partial(_attend, _name))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def calls_interface(module: nn.Module) -> bool:
    """Returns whether a module is an attention that calls transformers' attention interface.

    The code of its forward shows this, so that no weights are needed. Falcon's attention calls
    torch directly, so it returns False for that.
    """
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and INTERFACE in code.co_names


def attentions_of(block: nn.Module) -> tuple[str, ...]:
    """Returns the names of a block's attentions whose queries, keys and values can be rounded."""
    return tuple(name for name, module in block.named_modules() if calls_interface(module))


def round_attentions(model: nn.Module, roundings: Mapping[str, dict[str, Any]]) -> None:
    """Marks attentions of a model, so that they round their queries, keys and values.

    roundings: the rounding of each attention, by name in memory.

    Raises ValueError, with the name of the attention, if the model does not have it or it cannot be
    rounded.
    """
    for name, rounding in roundings.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"config.json asks to round queries, keys and values of attention {name}, which "
                "this model does not have"
            ) from None
        if not calls_interface(module):
            raise ValueError(
                f"config.json asks to round queries, keys and values of attention {name}, but that "
                f"is a {type(module).__name__} that does not call transformers' attention interface"
            )
        round_attention(module, rounding)
