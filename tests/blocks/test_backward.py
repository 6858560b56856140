"""Gradients block by block are those of all blocks together, also through what blocks hand on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.blocks.arguments import BlockArguments
from lowbit.blocks.backward import Tape
from lowbit.blocks.stream import Batch, Stream

BATCHES, SHAPE = 2, (3, 5, 4)


class Plain(nn.Module):
    """A block that reads nothing but hidden states."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.inside = nn.Linear(SHAPE[-1], SHAPE[-1])

    def forward(self, hidden: Tensor, **state: Any) -> tuple[Tensor, None]:
        return hidden + self.inside(hidden).tanh(), None


class Writing(Plain):
    """Every block but the last writes to a dictionary; later ones read what all have written."""

    def forward(self, hidden: Tensor, **state: Any) -> tuple[Tensor, None]:
        earlier = sum((a * b.tanh() for a, b in state["shared"].values()), torch.zeros(()))
        out = hidden + self.inside(hidden + earlier).tanh()
        if self.index < 2:
            state["shared"][self.index] = (out.sin(), self.inside(hidden))
        return out, None


class Replacing(Plain):
    """Every block takes a value out of a list, and puts another one there for the next block."""

    def forward(self, hidden: Tensor, **state: Any) -> tuple[Tensor, None]:
        value = state["handed"].pop() if state["handed"] else torch.zeros(())
        out = hidden + self.inside(hidden * (1 + value)).tanh()
        state["handed"].append(out.cos())
        state["mask"].sum()
        return out, None


KINDS: dict[str, tuple[type[Plain], dict[str, Any]]] = {
    "hidden states alone": (Plain, {}),
    "a dictionary of pairs": (Writing, {"shared": {}}),
    "a list, and a tensor for all": (Replacing, {"handed": [], "mask": torch.ones(3)}),
}


def stream(state: dict[str, Any], folder: Path | None = None) -> Stream:
    calls = []
    for batch in range(BATCHES):
        hidden = torch.randn(SHAPE, generator=torch.Generator().manual_seed(batch))
        own = {k: type(v)(v) if isinstance(v, dict | list) else v for k, v in state.items()}
        calls.append([Batch(hidden, own) for _ in range(3)])
    return Stream.of_calls(calls, folder=folder)


def random_blocks(kind: type[Plain], draw: torch.Generator) -> list[Plain]:
    blocks = [kind(index) for index in range(3)]
    for parameter in (p for block in blocks for p in block.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    return blocks


def all_together(blocks: list[Plain], state: dict[str, Any], weights: list[Tensor]) -> list[Tensor]:
    """The gradients of a loss by the inputs; those by parameters are left in them."""
    inputs = []
    for batch, weight in zip(stream(state), weights, strict=True):
        hidden = batch.hidden.clone().requires_grad_()
        inputs.append(hidden)
        for block in blocks:
            hidden = block(hidden, **batch.kwargs)[0]
        (hidden * weight).sum().backward()  # type: ignore[no-untyped-call]
    return [hidden.grad for hidden in inputs]  # type: ignore[misc]


def gradients_of(blocks: list[Plain]) -> list[Tensor]:
    found = [p.grad for block in blocks for p in block.parameters()]
    for block in blocks:
        block.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_of_all_blocks_together(kind: str, on_disk: bool, tmp_path: Path) -> None:
    make, state = KINDS[kind]
    draw = torch.Generator().manual_seed(7)
    blocks = random_blocks(make, draw)
    weights = [torch.randn(SHAPE, generator=draw) for _ in range(BATCHES)]
    by_inputs, wanted = all_together(blocks, state, weights), gradients_of(blocks)
    places = [tmp_path / name if on_disk else None for name in ("now", "tape")]
    tape = Tape(stream(state, places[0]), places[1])
    for block in blocks:
        tape.forward(block)
    assert len(list(tmp_path.glob("tape/*/*.f32"))) == 3 * BATCHES * on_disk
    gradients = [weight.clone() for weight in weights]
    for block in reversed(blocks):
        tape.backward(block, gradients)
    found = [*gradients_of(blocks), *gradients]
    for ours, theirs in zip(found, [*wanted, *by_inputs], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("tape/*"))


def test_a_block_without_parameters_that_learn() -> None:
    block = Plain(0).requires_grad_(False)
    tape = Tape(Stream([torch.ones(1, 2, 4)], BlockArguments.of_one_block([{}])))
    tape.forward(block)
    gradient = torch.ones(1, 2, 4)
    tape.backward(block, [gradient])
    assert not torch.equal(gradient, torch.ones(1, 2, 4)) and block.inside.weight.grad is None
