"""Layers one by one become the tensors of the source checkpoint."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.checkpoint.stacks import as_in_source
from lowbit.formats.entry import Stack

COUNT, INNER, HIDDEN = 3, 4, 6
READERS = {"gate": slice(0, INNER), "up": slice(INNER, None)}
ALTERNATING = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
# By kind, the rows of gate and up, whether matrices are (in, out), have biases, and are in 2-D.
LAYOUTS: dict[str, tuple[dict[str, slice], bool, bool, bool]] = {
    "gate and up": (READERS, False, False, False),
    "turned, with biases": (READERS, True, True, False),
    "row by row, turned, with biases": (ALTERNATING, True, True, False),
    "row by row": (ALTERNATING, False, False, False),
    "no gate": ({"up": slice(None)}, False, True, False),
    "one below the other": ({"up": slice(None)}, False, False, True),
    "one below the other, turned": ({"up": slice(None)}, True, False, True),
}


def entry(shape: list[int], **facts: Any) -> dict[str, Any]:
    return {"format": "dense", "shape": shape, "dtype": "float32", **facts}


def layers_of(
    stack: Tensor, biases: Tensor | None, kind: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Cuts a stack into layers, and describes where they are."""
    parts, turned, _, flat = LAYOUTS[kind]
    tensors, entries = {}, {}
    matrices = stack.chunk(COUNT) if flat else stack.unbind()
    for number in range(COUNT):
        whole = matrices[number].T if turned else matrices[number]
        for name, rows in parts.items():
            layer = f"block.experts.{number}.{name}"
            tensors[f"{layer}.weight"] = whole[rows]
            if biases is not None:
                tensors[f"{layer}.bias"] = biases[number][rows]
            place = Stack(
                tensor="block.moe.stacked",
                bias=None if biases is None else "block.moe.stacked_bias",
                start=rows.start or 0,
                step=rows.step or 1,
                transposed=turned,
                flat=flat,
            )
            facts = place.model_dump(exclude_defaults=True)
            entries[layer] = entry(list(whole[rows].shape), stack=facts)
    return tensors, entries


def made(kind: str) -> tuple[Tensor, Tensor | None]:
    parts, turned, biased, flat = LAYOUTS[kind]
    rows = INNER * len(parts)
    shape = (HIDDEN, rows) if turned else (rows, HIDDEN)
    draw = torch.Generator().manual_seed(0)
    stack = torch.randn(COUNT, *shape, generator=draw)
    biases = torch.randn(COUNT, rows, generator=draw) if biased else None
    return stack.flatten(0, 1) if flat else stack, biases


@pytest.mark.parametrize("kind", LAYOUTS)
def test_experts_are_stacked_again(kind: str) -> None:
    stack, biases = made(kind)
    tensors, entries = layers_of(stack, biases, kind)
    other = torch.randn(2)
    found = as_in_source({"block.norm.weight": other, **tensors}, entries)
    wanted = {"block.norm.weight": other, "block.moe.stacked": stack}
    wanted |= {} if biases is None else {"block.moe.stacked_bias": biases}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("lost", ["block.experts.1.up.weight", "block.experts.2.gate.weight"])
def test_an_expert_that_is_not_whole_is_named(lost: str) -> None:
    tensors, entries = layers_of(*made("gate and up"), "gate and up")
    del tensors[lost]
    with pytest.raises(ValueError, match=rf"block\.moe\.stacked .*expert {lost.split('.')[2]}"):
        as_in_source(tensors, entries)


FORGED = {
    "the name of another tensor": ({"tensor": "block.norm.weight"}, "block.norm.weight"),
    "rows that are not there": ({"tensor": "s", "start": 100}, "s cannot be written"),
    "rows of another layer": ({"tensor": "s", "start": 0}, "s cannot be written"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_place_is_refused(kind: str) -> None:
    facts, message = FORGED[kind]
    tensors, entries = layers_of(*made("gate and up"), "gate and up")
    for name in entries:
        if name.endswith(".up"):
            entries[name]["stack"] = facts
        elif facts["tensor"] == "s":
            entries[name]["stack"]["tensor"] = "s"
    with pytest.raises(ValueError, match=message):
        as_in_source(tensors | {"block.norm.weight": torch.ones(2)}, entries)


def test_other_layers_stay_and_conv1d_is_turned() -> None:
    tensors = {f"{layer}.{end}": torch.randn(2, 3) for layer in "ab" for end in ("weight", "bias")}
    entries = {"a": entry([2, 3]), "b": entry([2, 3], transposed=True)}
    found = as_in_source(tensors, entries)
    assert torch.equal(found.pop("b.weight"), tensors.pop("b.weight").T)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_stack_is_not_turned_unless_its_entry_says_so() -> None:
    """Folders that were written before stacks could be transposed do not say it."""
    assert not Stack(tensor="mlp.experts.down_proj").transposed
