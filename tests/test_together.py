"""What processes exchange, between forked processes and in one that is alone."""

from typing import Any

import pytest
import torch
from forked import processes

from lowbit.ranks import NOBODY, Ranks, processor
from lowbit.together import Together, joined

CPU = torch.device("cpu")
VALUES = [1.5, float("inf"), None, "é", [0.1 + 0.2, {"a": -0.0}]]


def test_what_is_dealt_out() -> None:
    ranks = Ranks()
    ranks.count = 3
    assert [ranks.owner(i) for i in range(4)] == [0, 1, 2, 0]
    assert [list(ranks.own(4)), ranks.has(3), ranks.has(4)] == [[0, 3], True, False]
    costs = {"a": 1.0, "b": 5.0, "c": 2.0, "d": 2.0}
    assert ranks.assign(costs) == {"a": 1, "b": 0, "c": 1, "d": 2}
    assert list(ranks.assign(costs)) == list(costs)


def test_the_processor_has_a_name() -> None:
    assert torch.backends.cpu.get_cpu_capability() in processor(CPU)


def exchanged(ranks: Ranks) -> dict[str, Any]:
    """What a process gets, as JSON; tensors as lists of numbers."""

    def compute(batch: int) -> tuple[Any, list[torch.Tensor]]:
        kinds = (torch.float64, torch.int64, torch.bfloat16)
        return batch, [torch.full((batch, 2), float(batch)).to(kind) for kind in kinds]

    def numbers(found: Any) -> Any:
        return [[value, [None if t is None else t.tolist() for t in ts]] for value, ts in found]

    last = ranks.count - 1
    filled = torch.full((3,), float(ranks.index))
    ranks.fill(filled, last)
    sent = ranks.tensors(lambda: {"x": torch.arange(3), "none": torch.empty(0, 2)})
    return {
        "values": ranks.value(lambda: VALUES),
        "losses": ranks.losses([0, 1, 2, 5, 6], lambda batch: batch / 3),
        "to all": numbers(ranks.in_turn(4, compute, CPU)),
        "to one": numbers(ranks.in_turn(4, compute, CPU, lambda b, v: [0, last, NOBODY])),
        "filled": filled.tolist(),
        "sent": {name: tensor.tolist() for name, tensor in sent.items()},
        "shape": list(sent["none"].shape),
    }


@pytest.mark.slow
def test_everything_arrives() -> None:
    alone = exchanged(Ranks())

    def member(index: int) -> dict[str, Any]:
        with joined() as ranks:
            assert isinstance(ranks, Together)
            return exchanged(ranks)

    found = [each["result"] for each in processes(3, member)]
    for index, each in enumerate(found):
        for name in ("values", "losses", "to all", "sent", "shape"):
            assert each[name] == alone[name], name
        assert each["filled"] == [2.0] * 3
        for (batch, tensors), (_, wanted) in zip(each["to one"], alone["to all"], strict=True):
            received = [wanted[0] if index == 0 else None, wanted[1] if index == 2 else None, None]
            assert tensors == received, batch


@pytest.mark.slow
def test_without_torchrun_a_process_is_alone() -> None:
    with joined() as ranks:
        assert (ranks.index, ranks.count) == (0, 1)
