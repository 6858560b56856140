"""Check a quantized folder before anything is loaded from it.

Nothing in the folder is trusted: config.json may be edited, shards cut or exchanged. Whatever is
wrong is a ValueError that names the file, the layer or the tensor.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lowbit.checkpoint.ranges import expand
from lowbit.checkpoint.reader import INDEX, CheckpointReader, file_sha256, read_json
from lowbit.config import explain
from lowbit.formats import build, link
from lowbit.formats.activation import Activation

VERSION = 1  # of the checkpoint layout


class QuantizedFolder:
    """A folder that `lowbit quantize` wrote.

    config: config.json as a dictionary. entries: what it says of every quantized linear, by its
    name on disk. attention: how attentions round what they read, likewise. reader: its tensors.
    marker: the one empty tensor that makes transformers refuse the folder where lowbit is not
    imported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.quantization = quantization_section(self.config, folder)
        self.entries = quantized_entries(self.quantization, folder)
        self.attention = rounded_attentions(self.quantization, folder)
        self.marker = marker_of(self.quantization, self.entries, folder)
        self.reader = CheckpointReader(folder)

    def tensors_of(self, name: str) -> list[str]:
        """Names on disk of all tensors of one quantized linear."""
        with torch.device("meta"):
            return [f"{name}.{key}" for key in build(self.entries[name]).state_dict()]

    def verify(self, hashes: bool = True) -> None:
        """config.json, the shards' sizes and (slower) hashes, every quantized linear's tensors."""
        self._check_digest()
        self._check_files(hashes)
        for name, entry in self.entries.items():
            with torch.device("meta"):
                expected = build(entry).state_dict()
            for key, tensor in expected.items():
                self._check_tensor(f"{name}.{key}", tuple(tensor.shape), tensor.dtype)
        marker = self.reader.tensors.get(self.marker)
        if marker is None or marker.shape != (0,):
            raise ValueError(f"{self.folder}: the empty tensor {self.marker} is missing")

    def _check_tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        info = self.reader.tensors.get(name)
        if info is None:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        if info.shape != shape or info.dtype != dtype:
            raise ValueError(
                f"{self.folder}: tensor {name} is {info.dtype} {list(info.shape)}, "
                f"but config.json asks for {dtype} {list(shape)}"
            )

    def _check_digest(self) -> None:
        stated = self.quantization.get("digest")
        if stated is not None and stated != config_digest(self.config):
            raise ValueError(
                f"{self.folder}/config.json was edited after quantization: restore it, or, if you "
                "know what you changed, delete its quantization_config.digest"
            )

    def _check_files(self, hashes: bool) -> None:
        stated = self.quantization.get("files")
        if not isinstance(stated, dict):
            raise ValueError(f"{self.folder}/config.json: 'files' must map shards to size and hash")
        if sorted(stated) != self.reader.files:
            raise ValueError(
                f"{self.folder} has the shards {self.reader.files}, "
                f"but config.json lists {sorted(stated)}"
            )
        self._check_index()
        for file, facts in stated.items():
            path = self.folder / file
            if not isinstance(facts, dict) or facts.get("size") != path.stat().st_size:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, config.json says {facts}"
                )
            if hashes and facts.get("sha256") != file_sha256(path):
                raise ValueError(f"{path} is damaged: its sha256 is not the one in config.json")

    def _check_index(self) -> None:
        """What transformers offloads to disk it finds through the index alone."""
        path = self.folder / INDEX
        if not path.exists():
            return
        index = read_json(path)
        absent = sorted(self.reader.tensors.keys() - index["weight_map"].keys())
        if absent:
            raise ValueError(f"{path} lacks tensor {absent[0]}")
        if not isinstance(index.get("metadata"), dict):
            raise ValueError(f"{path}: 'metadata' must be an object")


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


def marker_of(section: dict[str, Any], entries: dict[str, Any], folder: Path | str) -> str:
    """The name of the empty tensor: the float weight of one quantized linear."""
    marker = section.get("marker")
    if not isinstance(marker, str) or marker.removesuffix(".weight") not in entries:
        raise ValueError(
            f"{folder}: marker must be the weight of a quantized layer, not {marker!r}"
        )
    return marker
