"""Every kind of damage to a quantized folder is refused with a message that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowbit.checkpoint import QuantizedFolder, verify
from lowbit.checkpoint.reader import INDEX
from lowbit.checkpoint.verify import check_dtypes

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
LINEAR = "model.layers.1.mlp.up_proj"
PATTERN = "model.layers.{0-1}.mlp.up_proj"
PLACEHOLDER = "model.layers.0.self_attn.q_proj.weight"
Damage = Callable[[Path], Any]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized.folder(), tmp_path / "out"))


def config(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Edits quantization_config."""
    return lambda folder: quantized.edit_json(
        folder / "config.json", lambda whole: spoil(whole["quantization_config"], change)
    )


def spoil(section: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> None:
    change(section)


def entry(**fields: Any) -> Damage:
    return config(lambda section: section["modules"][PATTERN].update(fields))


def shard(
    change: Callable[[dict[str, torch.Tensor]], Any], tensor: str = f"{LINEAR}.packed"
) -> Damage:
    return lambda folder: quantized.edit_shard(quantized.shard_with(folder, tensor), change)


def flip(folder: Path) -> None:
    data = bytearray((folder / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (folder / SHARDS[1]).write_bytes(data)


def cut(folder: Path) -> None:
    (folder / SHARDS[2]).write_bytes((folder / SHARDS[2]).read_bytes()[:-1])


def grow(folder: Path) -> None:
    """Adds a field to the metadata of a file, but no tensor."""
    with safe_open(folder / SHARDS[2], framework="pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    save_file(tensors, folder / SHARDS[2], metadata={"format": "pt", "more": "text"})


def unindexed(name: str) -> Damage:
    return lambda f: quantized.edit_json(f / INDEX, lambda i: spoil(i["weight_map"], drop(name)))


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.pop(name)


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


# Seen at once, whatever the checksums say: these are forged before the folder is verified.
WRONG: dict[str, tuple[Damage, str]] = {
    "newer": (config(lambda s: s.update(version=3)), "newer lowbit.*version 3.*pip install -U"),
    "version 0": (config(lambda s: s.update(version=0)), "positive integer, not 0"),
    "version true": (config(lambda s: s.update(version=True)), "positive integer, not True"),
    "other method": (config(lambda s: s.update(quant_method="gptq")), "quantized by GPTQ"),
    "no modules": (config(drop("modules")), "modules must name the quantized layers"),
    "empty modules": (config(lambda s: s.update(modules={})), "modules must name"),
    "bad range": (
        config(lambda s: s["modules"].update({"h.{3-2}": s["modules"][PATTERN]})),
        "modules: 'h.{3-2}' names 0 layers",
    ),
    "named twice": (
        config(lambda s: s["modules"].update({LINEAR: s["modules"][PATTERN]})),
        f"modules: '{LINEAR}' is named twice",
    ),
    "unknown format": (entry(format="unform"), "up_proj: format: .*did you mean 'uniform'"),
    "no format": (config(lambda s: s["modules"][PATTERN].pop("format")), "up_proj: format: ''"),
    "entry is a list": (config(lambda s: s["modules"].update({PATTERN: [1]})), "up_proj: entry is"),
    "bits": (entry(bits=9), r"up_proj: bits: .* \(got 9\)$"),
    "bits as text": (entry(bits="4"), r"up_proj: bits: .*integer \(got '4'\)$"),
    "misspelt": (entry(bit=4), "up_proj: .*did you mean 'bits'"),
    "other bits": (
        entry(bits=3),
        "0.mlp.up_proj.packed is torch.uint8 .*80, 24.* asks for .*80, 18",
    ),
    "other shape": (entry(shape=[40, 48]), "up_proj.packed is .*80, 24.* asks for .*40, 24"),
    "other groups": (entry(group_size=8), "up_proj.scale is .*80, 3.* asks for .*80, 6"),
    "other scale": (entry(scale_dtype="float32"), "scale is torch.float16.*asks for torch.float32"),
    "a bias": (entry(bias="float16"), "tensor model.layers.0.mlp.up_proj.bias is missing"),
    "a layer more": (
        config(lambda s: s["modules"].update({"lm_head": s["modules"][PATTERN]})),
        "tensor lm_head.packed is missing",
    ),
    "no files": (config(drop("files")), "files must give size and sha256 of each shard"),
    "files is a list": (config(lambda s: s.update(files=SHARDS)), "files must give"),
    "a file less": (config(lambda s: s["files"].pop(SHARDS[0])), "but config.json lists"),
    "a file more": (config(lambda s: s["files"].update(x={})), "but config.json lists"),
    "no placeholder": (config(drop("marker")), "marker must be the weight .* not None"),
    "placeholder of no layer": (
        config(lambda s: s.update(marker="lm_head.weight")),
        "marker must be",
    ),
    "placeholder elsewhere": (
        config(lambda s: s.update(marker=f"{LINEAR}.weight")),
        f"the placeholder {LINEAR}.weight is missing: it must be an empty tensor",
    ),
    "placeholder is gone": (
        both(shard(drop(PLACEHOLDER), PLACEHOLDER), unindexed(PLACEHOLDER)),
        f"the placeholder {PLACEHOLDER} is missing",
    ),
    "placeholder is not empty": (
        shard(lambda t: t.update({PLACEHOLDER: torch.ones(3)}), PLACEHOLDER),
        f"the placeholder {PLACEHOLDER} is missing",
    ),
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), f"shard {SHARDS[1]} is missing"),
    "cut shard": (cut, f"{SHARDS[2]} is cut short"),
    "missing tensor": (
        both(shard(drop(f"{LINEAR}.scale")), unindexed(f"{LINEAR}.scale")),
        f"tensor {LINEAR}.scale is missing",
    ),
    "wrong shape": (
        shard(lambda t: t.update({f"{LINEAR}.packed": torch.zeros(80, 25, dtype=torch.uint8)})),
        rf"tensor {LINEAR}.packed is torch.uint8 \[80, 25\], but config.json asks for "
        r"torch.uint8 \[80, 24\]",
    ),
    "wrong dtype": (
        shard(lambda t: t.update({f"{LINEAR}.packed": t[f"{LINEAR}.packed"].char()})),
        f"tensor {LINEAR}.packed is torch.int8",
    ),
    "not in the index": (
        unindexed("lm_head.weight"),
        f"{INDEX} does not list tensor lm_head.weight",
    ),
    "index without metadata": (
        lambda f: quantized.edit_json(f / INDEX, lambda index: spoil(index, drop("metadata"))),
        f"{INDEX}: 'metadata' must be an object",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "is unfinished: run the same"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "float": (
        lambda f: quantized.edit_json(f / "config.json", drop_section),
        "restore config.json",
    ),
}
# Seen by size, hash or digest alone.
DAMAGED: dict[str, tuple[Damage, str]] = {
    "flipped byte": (flip, f"{SHARDS[1]} is damaged: its sha256"),
    "grown": (grow, f"{SHARDS[2]} has .* bytes, not"),
    "edited": (config(lambda s: s["made_by"].update(seed=1)), "edited after quantization"),
    "edited outside": (
        lambda f: quantized.edit_json(f / "config.json", lambda c: c.update(rms_norm_eps=1e-3)),
        "config.json was edited after quantization: restore it, or",
    ),
    "another digest": (config(lambda s: s.update(digest="0" * 64)), "edited after quantization"),
}
CHEAP = ("grown", "edited", "edited outside", "another digest")  # seen without reading the shards


def drop_section(whole: dict[str, Any]) -> None:
    del whole["quantization_config"]


def verified(folder: Path, hashes: bool = True) -> None:
    QuantizedFolder(folder).verify(hashes)


def test_what_was_written_is_right(copy: Path) -> None:
    verified(copy)
    quantized.seal(copy)
    verified(copy)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str, copy: Path) -> None:
    damage, message = WRONG[name]
    damage(copy)
    if quantized_still(copy):
        quantized.seal(copy)
    for hashes in (True, False):
        with pytest.raises(ValueError, match=message):
            verified(copy, hashes)


def quantized_still(folder: Path) -> bool:
    try:
        return isinstance(quantized.section(folder), dict)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str, copy: Path) -> None:
    damage, message = DAMAGED[name]
    damage(copy)
    with pytest.raises(ValueError, match=message):
        verified(copy)
    if name in CHEAP:
        with pytest.raises(ValueError, match=message):
            verified(copy, hashes=False)
    else:
        verified(copy, hashes=False)


def test_who_knows_what_he_changes_removes_the_digest(copy: Path) -> None:
    config(lambda section: [section.pop("digest"), section["made_by"].clear()])(copy)
    verified(copy)


def test_an_entry_is_built_once_for_all_its_layers(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a malicious range of a million layers would take too long."""
    built: list[Any] = []
    build = verify.build
    monkeypatch.setattr(verify, "build", lambda entry: [built.append(entry), build(entry)][1])
    entries = QuantizedFolder(copy).entries
    assert len(built) == len(quantized.section(copy)["modules"]) == len(entries) / 2 == 7


@pytest.mark.parametrize("version", [1, 2])
def test_entries_say_the_dtype_of_the_float_weight(version: int) -> None:
    section, layer = {"version": version}, {"format": "uniform", "shape": [2, 2]}
    check_dtypes(section, {"a": {**layer, "dtype": "float16"}}, "x")
    for lacking in (layer, {**layer, "dtype": None}):
        entries = {"a": {**layer, "dtype": "float16"}, "b": lacking}
        if version == 1:
            check_dtypes(section, entries, "x")
            continue
        with pytest.raises(ValueError, match="x: layer b: dtype is missing; .* float32, float16"):
            check_dtypes(section, entries, "x")


def test_tensors_of_a_layer() -> None:
    folder = QuantizedFolder(quantized.folder("opt"))
    layer = "model.decoder.layers.0.fc1"
    assert set(folder.tensors_of(layer)) == {
        f"{layer}.{p}" for p in ("packed", "scale", "zero", "bias")
    }
    assert json.loads((quantized.folder("opt") / "config.json").read_text()) == folder.config
