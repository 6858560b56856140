"""What config.json says about a quantized folder, checked before anything is loaded from it.

Nothing in the folder is trusted: anybody may have edited config.json. Whatever is wrong is a
ValueError that names the file, the layer or the key. `QuantizedFolder.verify` compares the shards
with what config.json says.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

from lowbit.checkpoint.ranges import expand
from lowbit.checkpoint.reader import read_json
from lowbit.config import explain
from lowbit.formats import build, link
from lowbit.formats.activation import Activation
from lowbit.formats.entry import FloatName

# Of the checkpoint layout; folders of every earlier version keep loading.
# 1: entries do not say which dtype the float weight had. 2: they do, in `dtype`.
VERSION = 2
FLOATS: tuple[str, ...] = get_args(FloatName)


def config_digest(config: dict[str, Any]) -> str:
    """sha256 of config.json as a whole, but for the place where the digest itself stands."""
    section = {k: v for k, v in config["quantization_config"].items() if k != "digest"}
    whole = {**config, "quantization_config": section}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of any folder; ValueError when there is none yet, or it is no object."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if not (folder / "config.json").exists() and (folder / "run").is_dir():
        raise ValueError(f"{folder} is unfinished: run the same lowbit quantize command again")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json must hold an object")
    return config


def quantization_section(config: dict[str, Any], folder: Path | str) -> dict[str, Any]:
    """config.json's quantization_config, if it is ours and of a version that we read."""
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != "lowbit":
        raise ValueError(f"{folder} was not quantized by lowbit")
    version = section.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{folder}: version must be a positive integer, not {version!r}")
    if version > VERSION:
        raise ValueError(
            f"{folder} was written by a newer lowbit: its layout is version {version}, "
            f"this one reads up to {VERSION}; upgrade with: pip install -U lowbit"
        )
    return section


def quantized_entries(section: dict[str, Any], folder: Path | str) -> dict[str, dict[str, Any]]:
    """The entry of every quantized linear by its name on disk, checked."""
    modules = section.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise ValueError(f"{folder}: quantization_config.modules must name the quantized layers")
    for name, entry in modules.items():
        try:
            with torch.device("meta"):
                build(entry)
        except ValidationError as error:
            raise ValueError(f"{folder}: layer {name}: {explain(error)}") from None
        except ValueError as error:
            raise ValueError(f"{folder}: layer {name}: {error}") from None
    try:
        entries = expand(modules)
    except ValueError as error:
        raise ValueError(f"{folder}: quantization_config.modules: {error}") from None
    check_dtypes(section, entries, folder)
    _check_shared(entries, folder)
    return entries


def rounded_attentions(section: dict[str, Any], folder: Path | str) -> dict[str, dict[str, Any]]:
    """How the queries, keys and values of attentions are rounded, by name on disk, checked."""
    attention = section.get("attention", {})
    if not isinstance(attention, dict):
        raise ValueError(f"{folder}: quantization_config.attention must map attentions to settings")
    for name, rounding in attention.items():
        try:
            Activation.model_validate(rounding)
        except ValidationError as error:
            raise ValueError(f"{folder}: attention {name}: {explain(error)}") from None
    try:
        return expand(attention)
    except ValueError as error:
        raise ValueError(f"{folder}: quantization_config.attention: {error}") from None


def _check_shared(entries: dict[str, dict[str, Any]], folder: Path | str) -> None:
    """What a layer shares another one must hold, and so that it fits."""
    checked: set[str] = set()
    for name, entry in entries.items():
        owner = entry.get("shares")
        if owner is None:
            continue
        pair = json.dumps([{**entry, "shares": None}, entries.get(owner)], sort_keys=True)
        if pair in checked:  # as in most blocks
            continue
        checked.add(pair)
        with torch.device("meta"):
            layers = {n: build(entries[n]) for n in (name, owner) if n in entries}
        try:
            link(layers)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None


def check_dtypes(
    section: dict[str, Any], entries: dict[str, dict[str, Any]], folder: Path | str
) -> None:
    """Raises ValueError where an entry does not say the dtype of its float weight, and must."""
    if section["version"] < 2:
        return
    for name, entry in entries.items():
        if entry.get("dtype") is None:
            raise ValueError(
                f"{folder}: layer {name}: dtype is missing; from version 2 on an entry says the "
                f"dtype of the float weight: {', '.join(FLOATS)}"
            )


def guard_of(section: dict[str, Any], entries: dict[str, Any], folder: Path | str) -> str:
    """The name of the guard tensor, which config.json calls `marker`.

    It is empty, and has the name of the float weight of a quantized layer: plain transformers, for
    which it has the wrong shape, then refuses the folder instead of inventing the weights.
    """
    guard = section.get("marker")
    if not isinstance(guard, str) or guard.removesuffix(".weight") not in entries:
        raise ValueError(
            f"{folder}: quantization_config.marker must be the weight of a quantized layer, not "
            f"{guard!r}"
        )
    return guard
