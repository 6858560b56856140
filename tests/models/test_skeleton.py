from collections import Counter

import image_text_zoo
import pytest
import torch
import zoo
from transformers import AutoConfig

from lowbit.blocks.experts import ExpertNames, UnfusedExperts
from lowbit.checkpoint import CheckpointReader
from lowbit.models import skeleton
from lowbit.models.skeleton import build_skeleton, memory_names, unfuse_experts

EXPERTS = {
    "mixtral": (2, ExpertNames("w1", "w3", "w2")),
    "qwen3_moe": (1, ExpertNames("gate_proj", "up_proj", "down_proj")),
    "qwen2_moe": (2, ExpertNames("gate_proj", "up_proj", "down_proj")),
    "olmoe": (2, ExpertNames("gate_proj", "up_proj", "down_proj")),
}
every_mixture = pytest.mark.parametrize("name", EXPERTS)


def line(name: str) -> zoo.Line:
    return (zoo.ZOO | zoo.DISCOVERED)[name]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_skeleton_has_no_weights_but_its_buffers(name: str) -> None:
    model = build_skeleton(AutoConfig.from_pretrained(zoo.folder(name)))
    assert not model.training
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_buffers_are_not_rounded_to_the_dtype_of_the_model() -> None:
    config = AutoConfig.for_model("gemma3", **image_text_zoo.IMAGE_TEXT["gemma3"])
    config.dtype = torch.bfloat16
    scale = build_skeleton(config).get_buffer("model.language_model.embed_tokens.embed_scale")
    assert scale.dtype == torch.float32 and float(scale) == pytest.approx(48**0.5, rel=1e-6)
    assert config.dtype == torch.bfloat16


@every_mixture
def test_unfused_experts_compute_the_same(name: str) -> None:
    model = zoo.make(line(name))
    batch = zoo.tokens()
    wanted = model(batch).logits
    replaced = unfuse_experts(model)
    assert len(replaced) == EXPERTS[name][0]
    assert all(isinstance(model.get_submodule(n), UnfusedExperts) for n in replaced)
    assert {expert.names for n in replaced for expert in model.get_submodule(n)} == {
        EXPERTS[name][1]
    }
    assert zoo.error(model(batch).logits, wanted) < 2e-6
    assert unfuse_experts(model) == []


def test_unfused_where_asked_for() -> None:
    model = zoo.make(line("mixtral"))
    assert unfuse_experts(model, only=["model.layers.1.self_attn.q_proj"]) == []
    assert unfuse_experts(model, only=["model.layers.1.mlp.experts.0.w1"]) == [
        "model.layers.1.mlp.experts"
    ]
    assert not isinstance(model.model.layers[0].mlp.experts, UnfusedExperts)


@pytest.mark.parametrize("name", [*zoo.ZOO, *zoo.DISCOVERED])
def test_every_tensor_on_disk_has_its_own_name_in_memory(name: str) -> None:
    model = build_skeleton(AutoConfig.from_pretrained(zoo.folder(name)))
    on_disk = CheckpointReader(zoo.folder(name)).tensors
    names = memory_names(model, on_disk)
    assert list(names) == list(on_disk)
    found = {names[disk]: info.shape for disk, info in on_disk.items()}
    assert len(found) == len(on_disk)
    parameters = dict(model.named_parameters())
    known = {n: tuple(t.shape) for n, t in model.state_dict().items() if n in parameters}
    tied = {} if "lm_head.weight" in on_disk else model.all_tied_weights_keys
    assert found == {n: shape for n, shape in known.items() if n not in tied}


def test_names_on_disk_are_the_old_ones() -> None:
    """Mixtral's names on disk differ from those in memory; quantized tensors are renamed alike."""
    model = build_skeleton(AutoConfig.from_pretrained(zoo.folder("mixtral")))
    names = {
        f"model.layers.1.block_sparse_moe.{disk}": f"model.layers.1.mlp.{memory}"
        for disk, memory in {
            "gate.weight": "gate.weight",
            "experts.3.w1.weight": "experts.3.w1.weight",
            "experts.3.w2.packed": "experts.3.w2.packed",
        }.items()
    } | {n: n for n in ("model.layers.0.self_attn.q_proj.packed", "lm_head.scale")}
    assert memory_names(model, names) == names


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_linear_finds_its_name_on_disk(name: str) -> None:
    model = zoo.source(name)
    found = Counter(
        model.disk_name(f"{block}.{linear}")
        for block in model.block_names
        for group in model.groups(block)
        for linear in group.linears
    )
    assert set(found.values()) == {1}
    assert all(f"{disk}.weight" in model.reader.tensors for disk in found)
    moved = {disk for disk in found if "block_sparse_moe.experts" in disk}
    assert len(moved) == (24 if name == "mixtral" else 0)


def test_large_parameters_are_never_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    kept = skeleton._values

    def noted(sizes: object) -> int:
        made.append("seen")
        return kept(sizes)

    monkeypatch.setattr(skeleton, "LARGE", 1)
    monkeypatch.setattr(skeleton, "_values", noted)
    model = build_skeleton(
        AutoConfig.for_model(line("mixtral").model_type, **line("mixtral").options)
    )
    assert made and all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
