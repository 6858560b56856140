from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn

from lowbit.models import FAMILIES
from lowbit.models.family import FoldRule, Group, always
from lowbit.models.wiring import folds_of, groups_of, matrices_of

# Free channels of every kind of fold: the largest number that leaves the output unchanged.
SIZES = {
    "opt": {"norm": 48, "values": 48, "rotary": 48},
    "llama": {"norm": 48, "values": 2 * 12, "rotary": 2 * 6, "gated": 80},
    "qwen3": {"norm": 48, "values": 2 * 16, "rotary": 8, "gated": 80},
    "qwen3_moe": {"norm": 48, "values": 2 * 16, "rotary": 8, "gated": 24},
    "falcon 7b": {"norm": 48, "values": 12, "rotary": 6},
    "falcon 40b": {"norm": 48, "values": 2 * 12, "rotary": 2 * 6},
    "falcon rw": {"norm": 48, "values": 48, "rotary": 48},
    "mixtral": {"norm": 48, "values": 2 * 12, "rotary": 2 * 6, "gated": 80},
}


def block_with(*names: str) -> nn.Module:
    """A block with linears of these names, on the meta device."""
    block = nn.Module()
    for name in names:
        *path, last = name.split(".")
        at = block
        for part in path:
            if not hasattr(at, part):
                setattr(at, part, nn.Module())
            at = at.get_submodule(part)
        setattr(at, last, nn.Linear(4, 4, device="meta"))
    return block


@pytest.mark.parametrize("name", SIZES)
def test_free_channels(name: str) -> None:
    model = zoo.source(name)
    folds = model.folds(model.block_names[0])
    assert {fold.kind: fold.size for fold in folds} == SIZES[name]
    for fold in folds:  # each free channel divides something and multiplies something
        for channels in (fold.source_channels, fold.reader_channels):
            assert channels is None or sorted(set(channels.tolist())) == list(range(fold.size))


def test_groups_of_experts_are_numbered() -> None:
    model = zoo.source("mixtral")
    found = {group.name: group.linears for group in model.groups("model.layers.0")}
    assert list(found)[:2] == ["attention.input", "attention.output"]
    assert {n: linears for n, linears in found.items() if "experts" in n} == {
        f"mlp.experts.{i}.{n}": tuple(f"mlp.experts.{i}.{w}" for w in linears)
        for i in range(4)
        for n, linears in (("input", ("w1", "w3")), ("output", ("w2",)))
    }


def test_the_router_reads_the_norm_with_all_experts() -> None:
    model = zoo.source("mixtral")
    folds = {fold.source: fold.readers for fold in model.folds("model.layers.0")}
    experts = [f"mlp.experts.{i}.{w}" for w in ("w1", "w3") for i in range(4)]
    assert folds["post_attention_layernorm"] == ("mlp.gate", *experts)


FAMILY = replace(
    FAMILIES["LlamaForCausalLM"],
    name="invented",
    groups=always(Group("both", ("a", "b")), Group("e.*", ("e.*.x", "e.*.y"))),
    folds=always(FoldRule("norm", "norm", ("a", "b"))),
)


@pytest.mark.parametrize(
    ("linears", "found"),
    [
        ((), []),
        (("c",), []),
        (("a", "b"), [("both", ("a", "b"))]),
        (("b", "x", "a"), [("both", ("a", "b"))]),
        (
            ("e.0.x", "e.0.y", "e.11.x", "e.11.y"),
            [("e.0", ("e.0.x", "e.0.y")), ("e.11", ("e.11.x", "e.11.y"))],
        ),
    ],
    ids=str,
)
def test_a_group_applies_where_its_linears_are(
    linears: tuple[str, ...], found: list[tuple[str, tuple[str, ...]]]
) -> None:
    groups = groups_of(FAMILY, None, block_with(*linears))
    assert [(group.name, group.linears) for group in groups] == found


@pytest.mark.parametrize("linears", [("a",), ("b", "e.0.x", "e.0.y"), ("e.0.x",)], ids=str)
def test_a_group_with_some_of_its_linears_missing_is_an_error(linears: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match="table of family invented does not fit .* a block lacks modules that"
    ):
        groups_of(FAMILY, None, block_with(*linears))


def test_a_fold_needs_its_source_all_readers_and_a_weight() -> None:
    model = zoo.source("llama")

    def names(block: nn.Module) -> list[str]:
        return [fold.name for fold in folds_of(FAMILY, model.config, block)]

    block = block_with("a", "b")
    assert names(block) == []
    block.norm = nn.LayerNorm(4, elementwise_affine=False)
    assert names(block) == []
    block.norm = nn.LayerNorm(4)
    assert names(block) == ["norm>a"]
    del block.b
    with pytest.raises(ValueError, match="a block lacks modules that it names .a: 1 found, b: 0"):
        names(block)


def test_matrices_of() -> None:
    block = block_with("a", "b.c")
    block.norm = nn.LayerNorm(4)
    block.fused = nn.Parameter(torch.zeros(2, 3, 4))
    block.b.conv = nn.Conv1d(2, 2, 1)
    assert matrices_of(block) == {
        name: block.get_parameter(f"{name}.weight" if name != "fused" else name).numel()
        for name in ("a", "b.c", "b.conv", "fused")
    }


def test_a_rule_may_take_some_rows_of_a_fused_matrix() -> None:
    """As in Phi-3, whose gate and up projections are the halves of one matrix."""
    rule = FoldRule("gated", "gate_up", ("down",), source_rows=lambda config: torch.arange(2, 4))
    family = replace(FAMILY, folds=always(rule))
    (fold,) = folds_of(family, None, block_with("gate_up", "down"))
    assert fold.size == 2 and torch.equal(fold.source_rows, torch.tensor([2, 3]))
