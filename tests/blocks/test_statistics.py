import pytest
import torch
import zoo
from torch import Tensor

from lowbit.blocks.capture import call_block, observed
from lowbit.blocks.statistics import ChannelStatistics, input_statistics


def direct(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows.double()
    return rows.abs().amax(0), rows.abs().mean(0), rows.square().mean(0)


def assert_equal(found: ChannelStatistics, rows: Tensor) -> None:
    assert found.tokens == len(rows)
    for value, wanted in zip(
        (found.absmax, found.absmean, found.square), direct(rows), strict=True
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)
    deviation = rows.double().abs().std(0, correction=0)
    torch.testing.assert_close(found.deviation.double(), deviation, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_of_any_size_add_up(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = (torch.randn(90, 5, generator=draw) * torch.arange(1, 6)).to(dtype)
    statistics = ChannelStatistics.empty(5, torch.device("cpu"))
    for piece in (rows[:1], rows[1:51], rows[51:51], rows[51:89].view(2, 19, 5), rows[89:]):
        statistics.update(piece)
    assert_equal(statistics, rows.float())


def test_extremes_have_their_signs() -> None:
    statistics = ChannelStatistics.empty(3, torch.device("cpu"))
    for piece in ([[1.0, -2, 5], [3, -1, 4]], [[2.0, -3, -1]]):
        statistics.update(torch.tensor(piece))
    assert statistics.low.tolist() == [1, -3, -1] and statistics.high.tolist() == [3, -1, 5]


def test_the_place_of_the_largest() -> None:
    statistics = ChannelStatistics.empty(3, torch.device("cpu"))
    rows = torch.zeros(2, 5, 3)
    rows[1, 3, 0] = -2
    rows[0, 4, 1] = 1
    statistics.update(rows)
    assert statistics.position.tolist() == [3, 4, 0]
    later = torch.zeros(1, 5, 3)
    later[0, 1] = torch.tensor([1.0, 3.0, 0.5])
    statistics.update(later)
    assert statistics.position.tolist() == [3, 1, 1]


def test_divided() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, scale = torch.randn(30, 4, generator=draw), torch.tensor([0.5, 1.0, 2.0, 8.0])
    whole, parts = (ChannelStatistics.empty(4, torch.device("cpu")) for _ in range(2))
    whole.update(rows)
    parts.update(rows / scale)
    assert_equal(whole.divided(scale), rows / scale)
    assert torch.equal(whole.divided(scale).position, parts.position)


def test_nothing_seen() -> None:
    statistics = ChannelStatistics.empty(3, torch.device("cpu"))
    statistics.update(torch.empty(0, 3))
    assert statistics.tokens == 0 and not statistics.absmax.any()


@pytest.mark.parametrize("name", ["llama", "opt", "falcon 40b", "mixtral", "qwen3_moe"])
def test_statistics_of_every_group_of_a_block(name: str) -> None:
    task = zoo.task(name)
    seen: dict[str, list[Tensor]] = {group.name: [] for group in task.groups}
    last = {group.linears[-1]: group.name for group in task.groups}  # any of its linears will do
    with observed(task.block, last, lambda n, x: seen[last[n]].append(x.flatten(0, -2))):
        for batch in task.streams["float"]:
            call_block(task.block, batch)
    found = input_statistics(task.block, task.groups, task.streams["float"])
    assert list(found) == [group.name for group in task.groups]
    for group, statistics in found.items():
        assert_equal(statistics, torch.cat(seen[group]))


def test_experts_count_their_own_tokens() -> None:
    task = zoo.task("mixtral")
    tokens = {
        n: s.tokens
        for n, s in input_statistics(task.block, task.groups, task.streams["float"]).items()
    }
    everything = 3 * 2 * zoo.TOKENS
    assert tokens.pop("attention.input") == tokens.pop("attention.output") == everything
    assert all(
        tokens[f"mlp.experts.{i}.input"] == tokens[f"mlp.experts.{i}.output"] for i in range(4)
    )
    assert sum(tokens[f"mlp.experts.{i}.input"] for i in range(4)) == 2 * everything
    assert len(set(tokens.values())) > 1
