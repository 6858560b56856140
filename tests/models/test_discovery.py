from pathlib import Path
from typing import Any, SupportsIndex

import pytest
import zoo
from torch import nn
from transformers import AutoConfig

from lowbit.blocks.experts import Expert
from lowbit.models.discovery import discover
from lowbit.models.skeleton import build_skeleton
from lowbit.models.source import SourceModel
from lowbit.models.wiring import groups_of

ATTENTION = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
MLP = [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
SHARED = [
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ("mlp.shared_expert.down_proj",),
]
MIXTURE = [
    group
    for i in range(4)
    for group in (
        (f"mlp.experts.{i}.gate_proj", f"mlp.experts.{i}.up_proj"),
        (f"mlp.experts.{i}.down_proj",),
    )
]
FOUND = {
    "gemma2": ("model.layers", [*ATTENTION, *MLP], ()),
    "phi3": (
        "model.layers",
        [("self_attn.qkv_proj",), ATTENTION[1], ("mlp.gate_up_proj",), MLP[1]],
        (),
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        [
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ],
        (),
    ),
    "gpt2": (
        "transformer.h",
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
        (),
    ),
    "qwen2_moe": (
        "model.layers",
        [*ATTENTION, *SHARED, *MIXTURE],
        ("mlp.gate", "mlp.shared_expert_gate"),
    ),
    "olmoe": ("model.layers", [*ATTENTION, *MIXTURE], ("mlp.gate",)),
    "hunyuan_v1_moe": (
        "model.layers",
        [*ATTENTION, *[tuple(n.replace("expert", "mlp") for n in names) for names in SHARED]]
        + MIXTURE,
        ("mlp.gate.wg",),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_blocks_groups_and_routers_are_found(name: str) -> None:
    model = zoo.source(name)
    path, groups, skip = FOUND[name]
    assert (model.family.name, model.family.blocks) == ("discovered", path)
    for block in model.block_names:
        assert sorted(group.linears for group in model.groups(block)) == sorted(groups)
    assert model.family.skip == skip
    assert model.left_float == [f"{block}.{n}" for block in model.block_names for n in skip]


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3_moe", "falcon 7b", "falcon rw", "mixtral"])
def test_the_tables_of_known_families_are_found(name: str) -> None:
    model = zoo.source(name)
    family = discover(build_skeleton(AutoConfig.from_pretrained(zoo.folder(name))))
    assert family.blocks == model.family.blocks
    assert bool(family.tuple_output) == bool(model.family.tuple_output)
    for index, block in enumerate(model.block_names):
        groups = groups_of(family, model.config, model.skeleton.get_submodule(block), index)
        assert {frozenset(group.linears) for group in groups} == {
            frozenset(group.linears) for group in model.groups(block)
        }
    assert set(family.skip) == set(model.family.skip)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.model, "layers", nn.Identity()), "no list of blocks"),
        (lambda model: setattr(model.model, "rotary_emb", None), "add a table of about 30 lines"),
    ],
    ids=["no list", "untraceable"],
)
def test_what_cannot_be_found_is_said(change: object, message: str) -> None:
    model = build_skeleton(AutoConfig.from_pretrained(zoo.folder("llama")))
    change(model)  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"LlamaForCausalLM.*{message}"):
        discover(model)


def test_few_copies_are_made_of_many_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying modules is what takes time: once for each kind of block is enough."""
    experts, copied = 16, 0

    def count(self: Expert, protocol: SupportsIndex) -> Any:
        nonlocal copied
        copied += 1
        return object.__reduce_ex__(self, protocol)

    monkeypatch.setattr(Expert, "__reduce_ex__", count)
    options = zoo.DISCOVERED["olmoe"].options | {"num_experts": experts, "num_hidden_layers": 6}
    source = SourceModel(zoo.write(zoo.Line("olmoe", options), tmp_path))
    assert len(source.groups(source.block_names[-1])) == 2 + 2 * experts
    source.without_blocks()
    assert copied <= 2 * experts
    copied = 0
    assert all(source.folds(block) for block in source.block_names)
    assert copied <= 2 * experts
