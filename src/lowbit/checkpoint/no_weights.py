"""Says what a folder holds that has no weights in safetensors, and what to do with it."""

import re
from collections.abc import Callable
from pathlib import Path

from lowbit.checkpoint.inside import BLOBS, SNAPSHOTS, file_inside
from lowbit.checkpoint.reader import INDEX, SINGLE, read_json

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<of>\d{5})\.safetensors")
ORIGINAL = "name a copy of it that transformers writes (model.safetensors and config.json)"


def explain_missing_weights(folder: Path) -> str:
    """Returns what is in the folder instead of weights, and what to do; a sentence without subject.

    folder: has neither model.safetensors nor its index.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return "is empty: name the folder that holds the model"
    for rule in RULES:
        found = rule(folder, names)
        if found is not None:
            return found
    return f"has no weights: it has neither {SINGLE} nor {INDEX}. Name the folder that holds them"


def _adapter(folder: Path, names: list[str]) -> str | None:
    if "adapter_config.json" not in names and not _first(names, r"adapter_model\..+"):
        return None
    base = ""
    if file_inside(folder, "adapter_config.json") is not None:
        stated = read_json(folder / "adapter_config.json")
        named = stated.get("base_model_name_or_path") if isinstance(stated, dict) else None
        base = f" ({named})" if isinstance(named, str) and named else ""
    return (
        "holds an adapter alone, not a model: merge it into its base model"
        f"{base} with peft (merge_and_unload), save that with save_pretrained, and name its folder"
    )


def _gguf(folder: Path, names: list[str]) -> str | None:
    file = _first(names, r".+\.gguf")
    return file and (
        f"has its weights in {file}, in the layout GGUF of llama.cpp, which lowbit does not read: "
        "name the model that it was made from, in safetensors"
    )


def _pickles(folder: Path, names: list[str]) -> str | None:
    file = _first(names, r"pytorch_model.*\.bin|pytorch_model\.bin\.index\.json")
    return file and (
        f"has its weights in {file}, a pickle, which can run any code when it is loaded, so it is "
        f"not opened here. Convert it once with: lowbit convert {folder} CONVERTED --from-bin, "
        "then use CONVERTED"
    )


def _shards(folder: Path, names: list[str]) -> str | None:
    shards = [found for name in names if (found := SHARD.fullmatch(name))]
    if not shards:
        return None
    of = int(shards[0]["of"])
    count = f"{len(shards)} of {of} shards" if len(shards) < of else f"{of} shards"
    return (
        f"has {count}, such as {shards[0][0]}, but no {INDEX}, which says where each tensor is: "
        "copy it from the source of the model, or download the model again"
    )


def _original(folder: Path, names: list[str]) -> str | None:
    file = _first(names, r"consolidated.*|.+\.pth|.+\.nemo")
    return file and (
        f"has its weights in {file}, the layout in which the model was trained: {ORIGINAL}"
    )


def _other_frameworks(folder: Path, names: list[str]) -> str | None:
    file = _first(names, r".+\.(h5|msgpack|onnx|ot|npz|tflite|pt|ckpt|bin)")
    if file is None or file == "training_args.bin":
        return None
    return f"has its weights in {file}, which lowbit does not read: {ORIGINAL}"


def _diffusion(folder: Path, names: list[str]) -> str | None:
    if "model_index.json" not in names:
        return None
    return (
        "holds the parts of a diffusion pipeline (model_index.json), and lowbit quantizes language "
        "models: name a language model"
    )


def _other_names(folder: Path, names: list[str]) -> str | None:
    file = _first(names, r".+\.safetensors")
    return file and (
        f"has {file}, but neither {SINGLE} nor {INDEX}: if that file holds the whole model, rename "
        f"it to {SINGLE}"
    )


def _deeper(folder: Path, names: list[str]) -> str | None:
    """A folder of checkpoints, or the place in the cache of the hub that holds the snapshots."""
    places = [folder / name for name in names if (folder / name).is_dir()]
    if (folder / SNAPSHOTS).is_dir() and (folder / BLOBS).is_dir():
        places = sorted((folder / SNAPSHOTS).iterdir())
    holding = [path for path in places if any((path / name).exists() for name in (SINGLE, INDEX))]
    if not holding:
        return None
    return f"holds no model itself, but {holding[-1]} does: name that folder"


def _unfinished_download(folder: Path, names: list[str]) -> str | None:
    file = _first(names, r".+\.(incomplete|part|crdownload|aria2)")
    return file and f"has {file}, of a download that is not finished: download the model again"


RULES: tuple[Callable[[Path, list[str]], str | None], ...] = (
    _adapter,
    _pickles,
    _shards,
    _gguf,
    _diffusion,
    _original,
    _other_names,
    _other_frameworks,
    _unfinished_download,
    _deeper,
)


def _first(names: list[str], pattern: str) -> str | None:
    """The first name that matches a pattern as a whole."""
    return next((name for name in names if re.fullmatch(pattern, name)), None)
