"""Let an attention round what it reads: sets an attribute that `lowbit.models.attention` obeys.

transformers' attentions hand their queries, keys and values (after rotary embeddings, the whole
cache) to a function that they find by the name of their config's implementation. An attention that
rounds has the attribute, and a config that names one of our functions instead of transformers' own.
"""

from typing import Any

from torch import nn

PREFIX = "lowbit-"  # of the names of our functions: "lowbit-sdpa" wraps "sdpa"
WRAPPED = ("sdpa", "eager")
MARK = "lowbit_rounding"


def round_attention(attention: nn.Module, rounding: dict[str, Any]) -> None:
    """Makes an attention round its queries, keys and values, each token and head on its own grid.

    attention: is changed in place.
    rounding: {"bits": ..., "symmetric": ...}, as in config.json.

    Raises ValueError where the attention runs in a function that has no rounding counterpart.
    """
    config: Any = attention.config
    own = (config._attn_implementation or "").removeprefix(PREFIX)
    if own not in WRAPPED:
        raise ValueError(
            f"the attention implementation {own!r} cannot round queries, keys and values: "
            f"allowed are {' and '.join(WRAPPED)}"
        )
    config._attn_implementation = PREFIX + own
    if not hasattr(attention, MARK):
        attention.register_forward_pre_hook(_check_routed)
    setattr(attention, MARK, dict(rounding))


def _check_routed(attention: nn.Module, args: tuple[Any, ...]) -> None:
    """Refuses an implementation that was set later: it would silently leave the rounding out."""
    config: Any = attention.config
    if not str(config._attn_implementation).startswith(PREFIX):
        raise ValueError(
            f"this model rounds queries, keys and values, which {config._attn_implementation!r} "
            f"would not do: set the implementation {' or '.join(PREFIX + own for own in WRAPPED)}"
        )
