"""Folds found by experiment: all that the tables of known families name, and none that is inexact.

That random scales through them leave real blocks unchanged is in tests/families.py.
"""

from collections import Counter

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers import AutoConfig

from lowbit.blocks import Fold
from lowbit.blocks.folding import apply_fold
from lowbit.blocks.stream import Batch
from lowbit.models.discovery import discover
from lowbit.models.fold_search import search_folds
from lowbit.models.skeleton import build_skeleton
from lowbit.models.wiring import folds_of

pytestmark = pytest.mark.slow

WIDTH, INNER = 12, 20


def ends(folds: tuple[Fold, ...]) -> set[tuple[str, str, frozenset[str]]]:
    return {(f.kind, f.source, frozenset(f.readers)) for f in folds if f.kind != "rotary"}


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3_moe", "mixtral", "llama, tied, biased"])
def test_the_folds_of_tables_are_found(name: str) -> None:
    model = zoo.source(name)
    family = discover(build_skeleton(AutoConfig.from_pretrained(zoo.folder(name))))
    for index, block in enumerate(model.block_names):
        found = folds_of(family, model.config, model.skeleton.get_submodule(block), index)
        assert ends(found) >= ends(model.folds(block))


class Norm(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(WIDTH)), offset

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (self.weight + self.offset)


class Block(nn.Module):
    """An MLP behind a norm.

    offset: what the norm adds to its weight.
    act: applied to the gate; None: to the product.
    leak: whether the residual reads the norm's output too.
    """

    def __init__(self, offset: float = 0.0, fused: bool = False, how: str = "gated") -> None:
        super().__init__()
        self.norm, self.fused, self.how = Norm(offset), fused, how
        self.up = nn.Linear(WIDTH, INNER * (1 + fused), bias=False)
        if not fused:
            self.gate = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        gate, up = self.up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        out = gate.sigmoid() * up
        if self.how == "saturated":
            out = out.clamp(max=0.1)
        if self.how == "added":
            out = gate + up
        return (x if self.how == "read twice" else hidden) + self.down(out)


CASES = {  # arguments of the block, the kinds of its folds
    "plain": ({}, {"norm": 1, "gated": 1}),
    "1 + weight": ({"offset": 1.0}, {"norm": 1, "gated": 1}),
    "2 + weight": ({"offset": 2.0}, {"gated": 1}),
    "fused": ({"fused": True}, {"norm": 1, "gated": 1}),
    "the norm is read twice": ({"how": "read twice"}, {"gated": 1}),
    "the product saturates": ({"how": "saturated"}, {"norm": 1}),
    "a sum": ({"how": "added"}, {"norm": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_exact_is_found_and_nothing_else(name: str) -> None:
    options, kinds = CASES[name]
    block = Block(**options).requires_grad_(False)  # type: ignore[arg-type]
    found = search_folds(block, Batch(torch.randn(1, 5, WIDTH), {}), (), None)
    assert Counter(fold.kind for fold in found) == kinds
    for fold in found:
        assert fold.offset == (block.norm.offset if fold.kind == "norm" else 0.0)
        rows = torch.arange(INNER, 2 * INNER) if block.fused else None
        if fold.kind == "gated" and rows is not None:
            assert fold.source_rows is not None and torch.equal(fold.source_rows, rows)


def test_the_scale_of_a_norm_that_adds_to_its_weight() -> None:
    norm, scale = Norm(1.0), torch.tensor([0.5, -2.0] * (WIDTH // 2))
    x = torch.randn(3, WIDTH)
    weight = torch.randn(WIDTH)
    norm.weight.data = weight
    fold = Fold(kind="norm", source="n", readers=("r",), size=WIDTH, offset=1.0)
    tensors = {"n.weight": weight, "r.weight": torch.eye(WIDTH)}
    folded = apply_fold(tensors, fold, scale)
    wanted = norm(x)
    norm.weight.data = folded["n.weight"]
    torch.testing.assert_close(norm(x) @ folded["r.weight"].T, wanted)


def test_a_block_that_cannot_run_has_no_folds() -> None:
    assert search_folds(Block(), Batch(torch.randn(1, 5, WIDTH + 1), {}), (), None) == ()
