import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.blocks.arguments import BlockArguments, move
from lowbit.blocks.stream import Batch, Stream

Folder = Path | None


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return tmp_path / "stream" if request.param == "disk" else None


def hidden() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in ((2, 5, 3), (2, 5, 3), (1, 5, 3))]


def stream(folder: Folder, batches: list[Tensor] | None = None) -> Stream:
    batches = hidden() if batches is None else batches
    arguments = BlockArguments()
    for i in range(len(batches)):
        arguments.append([{"number": i}, {"number": 10 + i}])
    return Stream(batches, arguments, folder=folder)


def contents(stream: Stream) -> list[Tensor]:
    return [batch.hidden for batch in stream]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_come_back_in_order(folder: Folder) -> None:
    found = stream(folder)
    assert len(found) == 3 and equal(contents(found), hidden())
    assert [batch.kwargs for batch in found] == [{"number": i} for i in range(3)]
    assert torch.equal(found[2].hidden, hidden()[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_hidden_states_are_float32(folder: Folder, dtype: torch.dtype) -> None:
    given = [h.to(dtype).requires_grad_() for h in hidden()]
    found = contents(stream(folder, given))
    assert equal(found, [h.detach().float() for h in given])
    assert all(h.dtype == torch.float32 and not h.requires_grad for h in found)


def test_advanced_to_the_next_block(folder: Folder) -> None:
    found = stream(folder)
    found.advance(lambda batch: (batch.hidden + batch.kwargs["number"]).requires_grad_())
    assert equal(contents(found), [h + i for i, h in enumerate(hidden())])
    assert not any(h.requires_grad for h in found.hidden())
    assert [batch.kwargs["number"] for batch in found] == [10, 11, 12]
    assert [batch.kwargs["number"] for batch in found.map(lambda b: b.hidden)] == [10, 11, 12]
    found.advance(lambda batch: batch.hidden)
    assert [batch.kwargs for batch in found] == [{}, {}, {}]  # behind the last block
    with pytest.raises(RuntimeError):
        stream(folder).advance(lambda batch: batch.hidden[:, 1:])


def test_a_copy_goes_its_own_way(folder: Folder, tmp_path: Path) -> None:
    found = stream(folder)
    other = found.copy(folder and tmp_path / "other")
    other.advance(lambda batch: batch.hidden * 0)
    assert equal(contents(found), hidden()) and (found.block, other.block) == (0, 1)


def test_made_of_calls_one_batch_at_a_time(folder: Folder) -> None:
    made: list[int] = []

    def calls() -> Iterator[list[Batch]]:
        for i, states in enumerate(hidden()):
            made.append(i)
            yield [Batch(states, {"block": 0, "batch": i}), Batch(states, {"block": 1})]

    found = Stream.of_calls(calls(), folder=folder)
    assert made == [0, 1, 2] and equal(contents(found), hidden())
    assert found[2].kwargs == {"block": 0, "batch": 2}
    found.advance(lambda batch: batch.hidden)
    assert found[2].kwargs == {"block": 1}


def test_mapped_streams_stand_side_by_side(folder: Folder) -> None:
    found = stream(folder)
    found[0].hidden.requires_grad_()
    sums = found.map(lambda batch: batch.hidden + batch.kwargs["number"])
    products = found.map(lambda batch: batch.hidden * batch.kwargs["number"])
    assert equal(contents(found), hidden())
    assert equal(contents(sums), [h + i for i, h in enumerate(hidden())])
    assert equal(contents(products), [h * i for i, h in enumerate(hidden())])
    twice = sums.map(lambda batch: batch.hidden * 2)
    assert equal(contents(twice), [(h + i) * 2 for i, h in enumerate(hidden())])
    sums.advance(lambda batch: batch.hidden * 0)
    assert equal(contents(found), hidden()) and not any(h.requires_grad for h in contents(sums))


def test_on_disk_is_on_disk(tmp_path: Path) -> None:
    found = stream(tmp_path / "a" / "b")
    files = sorted((tmp_path / "a" / "b").iterdir())
    assert [f.stat().st_size for f in files] == [h.nbytes for h in hidden()]
    found.advance(lambda batch: torch.full_like(batch.hidden, 2.0))
    assert files[0].read_bytes() == struct.pack("<30f", *[2.0] * 30)
    mapped = found.map(lambda batch: batch.hidden + 1)
    assert len(list((tmp_path / "a" / "b").rglob("*.f32"))) == 6
    assert (contents(mapped)[0] == 3).all()
    del mapped  # and its files
    assert sorted((tmp_path / "a" / "b").iterdir()) == files


def test_a_folder_of_an_earlier_run_is_overwritten(tmp_path: Path) -> None:
    stream(tmp_path, [torch.ones(4, 5, 3)] * 3)
    assert equal(contents(stream(tmp_path)), hidden())


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="of 3 batches and keyword arguments of 2: the num"):
        Stream(hidden(), BlockArguments.of_one_block([{}, {}]))


def test_everything_moves_to_the_device() -> None:
    meta = torch.device("meta")
    value: dict[str, Any] = {"a": torch.ones(2), "b": (torch.ones(1), [None, "x"]), "c": 3}
    moved = move(value, meta)
    assert moved["a"].is_meta and moved["b"][0].is_meta
    assert moved["b"][1] == [None, "x"] and isinstance(moved["b"], tuple) and moved["c"] == 3
    assert not value["a"].is_meta
    arguments = BlockArguments.of_one_block([value])
    batch = Stream([torch.ones(1, 2, 3)], arguments, device="meta")[0]
    assert isinstance(batch, Batch) and batch.hidden.is_meta and batch.kwargs["b"][0].is_meta
