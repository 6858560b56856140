"""Make attention modules round their queries, keys and values.

An attention of transformers passes its queries, keys and values (after rotary embeddings, the
cache included) to a function that it looks up by `config._attn_implementation`. To make it round,
the config names one of our functions, which `lowbit.models.attention` registers, and the module
gets an attribute with the settings, which that function reads.
"""

from typing import Any

from torch import nn

PREFIX = "lowbit-"  # begins the names of our functions: "lowbit-sdpa" wraps "sdpa"
WRAPPED = ("sdpa", "eager")
MARK = "lowbit_rounding"


def round_attention(attention: nn.Module, rounding: dict[str, Any]) -> None:
    """Makes an attention round its queries, keys and values, each token and head on its own grid.

    attention: the module, which is changed in place.
    rounding: {"bits": ..., "symmetric": ...}, and {"rotation": {"seed": ..., "values": ...}} if
        heads are rotated first, as in config.json.

    Raises ValueError if the attention implementation is not one of those that we wrap.
    """
    config: Any = attention.config
    implementation = (config._attn_implementation or "").removeprefix(PREFIX)
    if implementation not in WRAPPED:
        raise ValueError(
            f"the attention implementation {implementation!r} cannot round queries, keys and "
            f"values: use {' or '.join(WRAPPED)}"
        )
    config._attn_implementation = PREFIX + implementation
    if not hasattr(attention, MARK):
        attention.register_forward_pre_hook(_check_routed)
    setattr(attention, MARK, dict(rounding))


def _check_routed(attention: nn.Module, args: tuple[Any, ...]) -> None:
    """Raises ValueError if another implementation was set later, since it would not round."""
    config: Any = attention.config
    if not str(config._attn_implementation).startswith(PREFIX):
        raise ValueError(
            "this model rounds queries, keys and values, but the attention implementation "
            f"{config._attn_implementation!r} does not: set it to "
            f"{' or '.join(PREFIX + name for name in WRAPPED)}"
        )
