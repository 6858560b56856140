"""Arguments of blocks, and the state that blocks share through them."""

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.blocks.arguments import BlockArguments

CPU = torch.device("cpu")
ONES = torch.ones(2)
Pair = namedtuple("Pair", "cos sin")


def shared_by_two_blocks(batches: int = 3) -> BlockArguments:
    """Both blocks get the same dict, as in models whose layers share keys and values."""
    arguments = BlockArguments()
    for _ in range(batches):
        state: dict[str, Any] = {"inner": []}
        arguments.append([{"state": state}, {"state": state, "again": (state,)}])
    return arguments


def test_what_a_block_writes_is_read_by_the_next_one_of_the_same_batch() -> None:
    arguments = shared_by_two_blocks()
    for batch in range(3):
        used = arguments.call(0, batch, CPU)
        used["state"]["keys"] = ONES * batch
        used["state"]["inner"].append(batch)
        arguments.keep(0, batch, used)
    for batch in range(3):
        later = arguments.call(1, batch, CPU)
        assert torch.equal(later["state"]["keys"], ONES * batch)
        assert later["state"]["inner"] == [batch]
        assert later["again"][0] is later["state"]


def test_a_call_that_is_not_kept_leaves_no_trace() -> None:
    arguments = shared_by_two_blocks()
    used = arguments.call(0, 0, CPU)
    used["state"]["keys"] = ONES
    used["state"]["inner"].append(1)
    for block in range(2):
        assert arguments.call(block, 0, CPU)["state"] == {"inner": []}


def test_a_copy_has_a_state_of_its_own() -> None:
    arguments = shared_by_two_blocks()
    other = arguments.copy()
    used = other.call(0, 0, CPU)
    used["state"]["keys"] = ONES
    other.keep(0, 0, used)
    assert "keys" not in arguments.call(1, 0, CPU)["state"]
    assert "keys" in other.call(1, 0, CPU)["state"] and len(other) == 3


def test_the_models_own_container_is_not_written_to() -> None:
    """One that a model passes to every forward pass would be one for all batches."""
    state: dict[str, Any] = {}
    arguments = BlockArguments.of_one_block([{"state": state}, {"state": state}])
    used = arguments.call(0, 0, CPU)
    used["state"]["keys"] = ONES
    arguments.keep(0, 0, used)
    assert not state and not arguments.call(0, 1, CPU)["state"]


class Shared(UserDict[str, Any]):
    """transformers' KVSharingDict is no dict, lest helpers of torch touch it."""


CHANGES: dict[str, tuple[Any, Any]] = {
    "added": ({"a": 1}, {"a": 1, "b": ONES}),
    "removed": ({"a": 1, "b": 2}, {"b": 2}),
    "exchanged": ({"a": ONES}, {"a": ONES * 2}),
    "emptied": ({"a": 1}, {}),
    "deeper": ({"a": {"b": [1]}}, {"a": {"b": [1, 2]}}),
    "no dict, but like one": (Shared({"a": 1}), Shared({"b": ONES})),
    "another kind": ({"a": {"b": 1}}, {"a": [1]}),
    "a longer list": ([1], [1, 2, 3]),
    "a shorter list": ([1, 2, 3], [1]),
    "an empty list": ([1, 2], []),
}


@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES)
def test_every_change_is_kept(before: Any, after: Any) -> None:
    arguments = BlockArguments.of_one_block([{"state": before}])
    arguments.keep(0, 0, {"state": after})
    found = arguments.call(0, 0, CPU)["state"]
    assert type(found) is type(after) and str(found) == str(after)


EQUAL: dict[str, tuple[Any, Any, bool]] = {
    "equal": (ONES, ONES.clone(), True),
    "other values": (ONES, ONES + 1, False),
    "other dtype": (ONES, ONES.double(), False),
    "other shape": (ONES, torch.ones(1), False),
    "inside a tuple": ((None, ONES), (None, ONES.clone()), True),
    "inside a named tuple": (Pair(ONES, 1), Pair(ONES.clone(), 1), True),
    "no tensor before": (None, ONES, False),
}


def tensor_of(value: Any) -> Tensor:
    return next(
        part for part in (value if isinstance(value, tuple) else (value,)) if torch.is_tensor(part)
    )


@pytest.mark.parametrize(("first", "second", "once"), EQUAL.values(), ids=EQUAL)
def test_equal_tensors_are_stored_once(first: Any, second: Any, once: bool) -> None:
    arguments = BlockArguments.of_one_block([{"mask": first}, {"mask": second}])
    stored = arguments.call(0, 1, CPU)["mask"]
    assert type(stored) is type(second)
    assert (tensor_of(stored) is not tensor_of(second)) == once
    assert torch.equal(tensor_of(stored), tensor_of(second))


def test_tensors_move_and_other_objects_do_not() -> None:
    thing = object()
    arguments = BlockArguments.of_one_block([{"a": {"b": (ONES, thing)}, "c": Pair(ONES, "x")}])
    moved = arguments.call(0, 0, torch.device("meta"))
    assert moved["a"]["b"][0].is_meta and moved["a"]["b"][1] is thing
    assert moved["c"].cos.is_meta and moved["c"].sin == "x"


def test_a_container_that_holds_itself() -> None:
    loop: list[Any] = [ONES]
    loop.append(loop)
    arguments = BlockArguments.of_one_block([{"loop": loop}])
    found = arguments.call(0, 0, CPU)["loop"]
    assert found[1] is found and found is not loop
    arguments.keep(0, 0, {"loop": found})
