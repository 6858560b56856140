import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.load import load_model
from lowbit.models.config import load_config
from lowbit.models.skeleton import unfuse_experts
from lowbit.models.source import SourceModel

LLAMA = zoo.ZOO["llama"]
TIED = zoo.ZOO["llama, tied, biased"]
Q = "model.layers.1.self_attn.q_proj.weight"


def first_inputs(model: SourceModel, *batches: Tensor) -> list[Tensor]:
    """The inputs of the first block."""
    return model.first_stream(batches).hidden()


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Edits the tensors of a folder with one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def weights(model: SourceModel) -> dict[str, Tensor]:
    """All tensors of all blocks, by their names in memory."""
    return {
        f"{name}.{tensor}": value
        for name in model.block_names
        for tensor, value in model.load_block(name).state_dict().items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral", "falcon rw"])
def test_blocks_are_float32_with_the_stored_values(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    line = zoo.ZOO[name]
    model = SourceModel(zoo.write(line, tmp_path, dtype))
    assert {info.dtype for info in model.reader.tensors.values()} == {dtype}
    wanted = zoo.make(line).to(dtype).float()
    unfuse_experts(wanted)
    found = weights(model)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    path = f"{model.family.blocks}."
    assert equal(found, {n: t for n, t in wanted.state_dict().items() if n.startswith(path)})
    assert not any(p.requires_grad for p in model.load_block(model.block_names[0]).parameters())
    (hidden,) = first_inputs(model, zoo.tokens())
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, wanted.get_input_embeddings()(zoo.tokens()))


def test_shards_are_as_good_as_one_file(tmp_path: Path) -> None:
    one, many = (
        zoo.source("mixtral"),
        SourceModel(zoo.write(zoo.ZOO["mixtral"], tmp_path, max_shard_size="40KB")),
    )
    assert len(many.reader.files) > 5
    assert many.disk_names == one.disk_names
    assert equal(weights(many), weights(one))
    (found,), (expected,) = (first_inputs(m, zoo.tokens()) for m in (many, one))
    assert torch.equal(found, expected)


def test_tensors_inside_and_outside_of_blocks() -> None:
    model = zoo.source("mixtral")
    assert sorted(model.outside_tensors()) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    inside = [model.block_tensors(name) for name in model.block_names]
    assert sorted([*inside[0], *inside[1], *model.outside_tensors()]) == sorted(
        model.reader.tensors
    )
    assert all(n.startswith("model.layers.1.") for n in inside[1])


def test_block_10_is_not_in_block_1(tmp_path: Path) -> None:
    options = LLAMA.options | {"num_hidden_layers": 11}
    model = SourceModel(zoo.write(zoo.Line("llama", options), tmp_path))
    assert [len(model.block_tensors(name)) for name in model.block_names] == [9] * 11


@pytest.mark.parametrize("name", ["embed_tokens only", "lm_head only", "both"])
def test_tied_weights_under_either_name(name: str, tmp_path: Path) -> None:
    wanted = zoo.source("llama, tied, biased")
    embedding = "model.embed_tokens.weight"

    def rename(tensors: dict[str, Tensor]) -> None:
        if name != "embed_tokens only":
            tensors["lm_head.weight"] = tensors[embedding].clone()
        if name == "lm_head only":
            del tensors[embedding]

    model = SourceModel(change(zoo.write(TIED, tmp_path), rename))
    assert ("lm_head.weight" in model.outside_tensors()) == (name != "embed_tokens only")
    (found,), (expected,) = (first_inputs(m, zoo.tokens()) for m in (model, wanted))
    assert torch.equal(found, expected)


def test_a_checkpoint_of_the_bare_model(tmp_path: Path) -> None:
    """Its names have no prefix, and its output layer is tied."""

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    model, wanted = (
        SourceModel(change(zoo.write(TIED, tmp_path), strip)),
        zoo.source("llama, tied, biased"),
    )
    assert model.disk_name("model.layers.0.mlp.up_proj") == "layers.0.mlp.up_proj"
    assert equal(weights(model), weights(wanted))
    (found,), (expected,) = (first_inputs(m, zoo.tokens()) for m in (model, wanted))
    assert torch.equal(found, expected)


def test_a_head_that_is_not_tied_must_be_there(tmp_path: Path) -> None:
    folder = change(zoo.write(LLAMA, tmp_path), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="tensor lm_head.weight is missing"):
        SourceModel(folder)


def test_the_first_stream_has_the_arguments_of_every_batch_and_block() -> None:
    model = zoo.source("qwen2")
    batches = [zoo.tokens(0), zoo.tokens(1), zoo.tokens(2, rows=1, length=9)]
    stream = model.first_stream(batches)
    assert [tuple(h.shape) for h in stream.hidden()] == [(2, 23, 48), (2, 23, 48), (1, 9, 48)]
    # Equal arguments are kept once per block, unequal ones are not confused.
    for block in range(2):
        calls = [stream.arguments.call(block, i, torch.device("cpu")) for i in range(3)]
        tables = [kwargs["position_embeddings"] for kwargs in calls]
        assert tables[0][0] is tables[1][0] and tables[2][0].shape[1] == 9
    (alone,) = first_inputs(model, batches[2])
    assert torch.equal(alone, stream.hidden()[2])


def test_a_block_that_is_loaded_leaves_the_skeleton_empty() -> None:
    model = zoo.source("llama")
    a, b = (model.load_block("model.layers.0") for _ in range(2))
    assert torch.equal(a.mlp.up_proj.weight, b.mlp.up_proj.weight)
    assert a.mlp.up_proj.weight.data_ptr() != b.mlp.up_proj.weight.data_ptr()
    first_inputs(model, zoo.tokens())
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "only a pickle": (to_pickle, "pytorch_model.bin, a pickle, .*Convert it once with.*CONVERTED"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a missing tensor": (
        lambda f: change(f, lambda tensors: tensors.pop(Q)),
        f"tensor {Q} is missing: the model that config.json describes needs it",
    ),
    "a wrong shape": (
        lambda f: change(f, lambda tensors: tensors.update({Q: torch.zeros(48, 40)})),
        rf"tensor {Q} has shape \[48, 40\], but config.json asks for \[48, 48\]",
    ),
    "a wrong dtype": (
        lambda f: change(f, lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)})),
        f"tensor {Q}, a weight stored as int8, so its values are codes",
    ),
    "quantized by others": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "was quantized by GPTQ",
    ),
    "quantized by us": (
        lambda f: change_config(f, quantization_config={"quant_method": "lowbit", "version": 1}),
        "is already quantized",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "an unknown activation": (
        lambda f: change_config(f, hidden_act="foo"),
        'hidden_act is "foo", which transformers .* cannot use',
    ),
    "a value of another type": (
        lambda f: change_config(f, rope_parameters=3),
        "config.json",
    ),
    "an unknown type": (
        lambda f: change_config(f, model_type="wombat"),
        "model_type 'wombat', which transformers .* does not know",
    ),
    "a type that reads and writes": (
        lambda f: change_config(f, model_type="t5"),
        "model_type 't5', and transformers has no model of this type that continues text",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), REFUSED.values(), ids=REFUSED)
def test_folders_that_cannot_be_quantized_are_refused(
    break_it: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    break_it(zoo.write(LLAMA, tmp_path))
    with pytest.raises(ValueError, match=message) as refusal:
        SourceModel(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["an unknown type", "a type that reads and writes"])
def test_a_type_is_refused_in_the_same_words_by_load(name: str, tmp_path: Path) -> None:
    break_it, message = REFUSED[name]
    break_it(zoo.write(LLAMA, tmp_path))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_tensors_that_no_module_has_are_left_alone(tmp_path: Path) -> None:
    """Old Llama checkpoints also hold the rotary table of every block."""
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = change(
        zoo.write(LLAMA, tmp_path), lambda tensors: tensors.update({extra: torch.ones(6)})
    )
    model = SourceModel(folder)
    assert extra not in model.disk_names.values()
    assert equal(weights(model), weights(zoo.source("llama")))


def test_code_in_the_folder_does_not_run(tmp_path: Path) -> None:
    zoo.write(LLAMA, tmp_path)
    change_config(
        tmp_path,
        model_type="wombat",
        auto_map={
            "AutoConfig": "wombat.WombatConfig",
            "AutoModelForCausalLM": "wombat.WombatForCausalLM",
        },
    )
    ran = tmp_path / "ran"
    (tmp_path / "wombat.py").write_text(f"open({str(ran)!r}, 'w')\n")
    for load in (SourceModel, load_config):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(tmp_path)
    assert not ran.exists()
