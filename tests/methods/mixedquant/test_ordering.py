import pytest
import torch
from torch import Tensor

from lowbit.blocks.statistics import ChannelStatistics
from lowbit.methods.mixedquant.ordering import (
    channel_order,
    column_max,
    column_norm,
    importance,
    is_identity,
    salient_count,
    sort_key,
)


@pytest.mark.parametrize(
    ("ratio", "alignment", "inputs", "count"),
    [
        (0.0, 32, 4096, 0),
        (0.01, 32, 4096, 32),
        (0.05, 32, 4096, 192),
        (0.05, 1, 4096, 205),
        (0.1, 32, 11008, 1088),
        (0.01, 32, 256, 32),  # never none, where some are asked for
        (0.01, 1, 24, 1),
        (0.1, 32, 24, 0),  # 32 of 24
        (0.1, 8, 8, 0),  # one input at least is ordinary
        (0.1, 8, 9, 8),
    ],
)
def test_salient_count(ratio: float, alignment: int, inputs: int, count: int) -> None:
    assert salient_count(ratio, alignment, inputs) == count


def seen() -> tuple[ChannelStatistics, Tensor]:
    """Four channels: small, with one peak, large and even, and one that is never there."""
    rows = torch.tensor([[0.1, 0.0, -3.0, 0.0], [0.2, 0.0, 3.0, 0.0], [0.1, -9.0, -3.0, 0.0]])
    statistics = ChannelStatistics.empty(4, torch.device("cpu"))
    statistics.update(rows[None])
    return statistics, rows


WEIGHTS = [
    torch.tensor([[1.0, 0.0, 0.5, -7.0]]),
    torch.tensor([[-2.0, 0.1, 0.5, 1.0], [0.0, 0.0, 0.5, 0.0]]),
]


def test_importance() -> None:
    statistics, rows = seen()
    mean = rows.abs().mean(0)
    torch.testing.assert_close(importance("absmean", statistics, WEIGHTS), mean)
    assert torch.equal(importance("absmax", statistics, WEIGHTS), rows.abs().amax(0))
    norm = torch.cat(WEIGHTS).norm(dim=0)
    torch.testing.assert_close(column_norm(WEIGHTS), norm)
    torch.testing.assert_close(importance("weighted", statistics, WEIGHTS), mean * norm)


def test_keys() -> None:
    statistics, rows = seen()
    size = rows.abs()
    wanted = {
        "none": torch.zeros(4),
        "max": size.amax(0),
        "mean3std": size.mean(0) + 3 * size.std(0, correction=0),
        "argmax": size.argmax(0),
        "weight_max": torch.cat(WEIGHTS).abs().amax(0),
    }
    for sort, key in wanted.items():
        found = sort_key(sort, statistics, WEIGHTS)  # type: ignore[arg-type]
        torch.testing.assert_close(found, key, msg=sort)
    assert torch.equal(column_max(WEIGHTS), wanted["weight_max"])


def test_order() -> None:
    key = torch.tensor([5.0, 1.0, 3.0, 1.0, 9.0, 2.0])
    matters = torch.tensor([0.0, 9.0, 0.0, 0.0, 8.0, 0.0])
    assert channel_order(key, matters, 2).tolist() == [3, 5, 2, 0, 1, 4]
    assert channel_order(key, matters, 0).tolist() == [1, 3, 5, 2, 0, 4]
    assert channel_order(torch.zeros(6), matters, 1).tolist() == [0, 2, 3, 4, 5, 1]


def test_what_is_in_order_already() -> None:
    assert is_identity(channel_order(torch.zeros(4), torch.arange(4.0), 0))
    assert is_identity(channel_order(torch.arange(4.0), torch.arange(4.0), 2))
    assert not is_identity(channel_order(torch.zeros(4), torch.arange(4.0).flip(0), 1))
