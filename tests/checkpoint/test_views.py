"""A view has the name, shape, dtype and content that its maker gives, in place of its sources."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.views import View, ViewingReader

STORED = {
    "plain": torch.arange(3.0),
    "stack": torch.arange(24.0).view(2, 3, 4).half(),
    "left": torch.ones(2, 5),
    "right": torch.zeros(1, 5),
}
VIEWS = {
    "first": View(("stack",), lambda stacks: stacks[0][0], (3, 4)),
    "turned": View(("stack",), lambda stacks: stacks[0][1].T, (4, 3)),
    "joined": View(("left", "right"), torch.cat, (3, 5)),
}
WANTED = {
    "plain": STORED["plain"],
    "first": STORED["stack"][0],
    "turned": STORED["stack"][1].T,
    "joined": torch.cat([STORED["left"], STORED["right"]]),
}


@pytest.fixture
def reader(tmp_path: Path) -> ViewingReader:
    save_file(STORED, tmp_path / "model.safetensors")
    return ViewingReader(CheckpointReader(tmp_path), VIEWS)


def test_views_replace_their_sources(reader: ViewingReader) -> None:
    facts = {name: (info.shape, info.dtype) for name, info in reader.tensors.items()}
    assert facts == {name: (tuple(t.shape), t.dtype) for name, t in WANTED.items()}
    assert {info.file for info in reader.tensors.values()} == {"model.safetensors"}
    assert reader.stored_bytes == sum(tensor.nbytes for tensor in STORED.values())


@pytest.mark.parametrize("names", [list(WANTED), ["turned", "plain"], ["first", "turned"], []])
def test_what_is_read(reader: ViewingReader, names: list[str]) -> None:
    found = reader.read(name for name in names)
    assert found.keys() == set(names)
    assert all(torch.equal(found[name], WANTED[name]) for name in names)
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_a_view_keeps_no_memory_of_the_stack(reader: ViewingReader) -> None:
    first = reader.read(["first"])["first"]
    assert first.untyped_storage().nbytes() == first.nbytes


def test_the_digest_is_that_of_the_files(reader: ViewingReader) -> None:
    assert reader.digest() == reader.inner.digest() == reader.digest(["first", "plain"])


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    broken = STORED | {"left": torch.full((2, 5), torch.nan)}
    save_file(broken, tmp_path / "model.safetensors")
    reader = ViewingReader(CheckpointReader(tmp_path), VIEWS)
    reader.read_finite(["first", "plain"])
    reader.digest(["first", "plain"])
    with pytest.raises(ValueError, match="joined"):
        reader.read_finite(["joined"])
    with pytest.raises(ValueError, match="left"):
        reader.digest(["joined"])
