from types import SimpleNamespace

import pytest

from lowbit.models.family import Heads, always, heads_of, rotary_channels


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({}, Heads(queries=4, keys=4, width=12, rotary=12)),
        ({"num_key_value_heads": 2}, Heads(4, 2, 12, 12)),
        ({"num_key_value_heads": None, "head_dim": None}, Heads(4, 4, 12, 12)),
        ({"num_key_value_heads": 1, "head_dim": 16}, Heads(4, 1, 16, 16)),
        ({"partial_rotary_factor": 0.5}, Heads(4, 4, 12, 6)),
        ({"partial_rotary_factor": None}, Heads(4, 4, 12, 12)),
    ],
    ids=str,
)
def test_heads_of_a_config(config: dict[str, object], heads: Heads) -> None:
    assert heads_of(SimpleNamespace(num_attention_heads=4, hidden_size=48, **config)) == heads


@pytest.mark.parametrize(
    ("heads", "channels", "size"),
    [
        (Heads(4, 2, 4, 4), [[0, 1, 0, 1], [2, 3, 2, 3]], 4),
        (Heads(2, 2, 3, 0), [[0, 1, 2], [3, 4, 5]], 6),
        (Heads(2, 1, 5, 4), [[0, 1, 0, 1, 2]], 3),
        (Heads(2, 2, 4, 2), [[0, 0, 1, 2], [3, 3, 4, 5]], 6),
    ],
    ids=str,
)
def test_the_members_of_a_rotary_pair_share_a_channel(
    heads: Heads, channels: list[list[int]], size: int
) -> None:
    found, count = rotary_channels(heads)
    assert (found.tolist(), count) == (channels, size)


def test_always() -> None:
    assert always(1, 2)(None) == (1, 2) and always()("any config") == ()
