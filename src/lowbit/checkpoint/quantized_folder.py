"""Reads a folder that lowbit has quantized, layer by layer or shard by shard, without a model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.config_values import check_layers
from lowbit.checkpoint.hashes import ADDED, loading_problem, problem_of
from lowbit.checkpoint.layers import check_tensor, layers_from
from lowbit.checkpoint.reader import INDEX, read_json
from lowbit.checkpoint.recognize import CONFIG, quantized_folder
from lowbit.checkpoint.verify import (
    config_digest,
    placeholder_of,
    quantization_section,
    quantized_entries,
    rounded_attentions,
)
from lowbit.formats import FORMATS, build
from lowbit.formats.base import QuantizedLinear

Progress = Callable[[int, int], None]  # number of shards done, number of all shards
# Name on disk of a layer and the layer -> the tensors to store instead, by name within the layer.
Convert = Callable[[str, QuantizedLinear], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Shard:
    """The content of one file of a quantized folder.

    file: name of the file.
    layers: names on disk of its quantized layers; a layer counts to the shard of its first tensor.
    others: names on disk of the tensors that belong to no quantized layer, without the placeholder.
    """

    file: str
    layers: tuple[str, ...]
    others: tuple[str, ...]


class QuantizedFolder:
    """Reads a folder that lowbit has quantized.

    config: the content of config.json.
    quantization: its quantization_config.
    entries: the entry of each quantized layer (format, shape, settings), by name on disk.
    attention: how attentions round their queries, keys and values, by name on disk.
    placeholder: the name of the empty tensor that makes transformers refuse the folder where lowbit
        is not imported.
    reader: reads the tensors.

    Raises ValueError if config.json or the header of a shard is invalid; `verify` checks the rest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = quantized_folder(folder)
        self.config = found.config
        self.quantization = quantization_section(self.config, folder)
        self.entries = quantized_entries(self.quantization, folder)
        self.attention = rounded_attentions(self.quantization, folder)
        self.placeholder = placeholder_of(self.quantization, self.entries, folder)
        self.reader = found.reader
        check_layers(folder / CONFIG, self.config, len(self.reader.tensors))

    def layer(self, name: str) -> QuantizedLinear:
        """Returns a quantized layer with its tensors, linked to the layer whose tensors it shares.

        name: the layer's name on disk.

        Raises ValueError for a layer that is not quantized, and for a tensor that is missing or has
        another shape or dtype than the layer's entry states.
        """
        names = [name]
        if (owner := self._entry(name).get("shares")) is not None:
            names.append(owner)
        stored = self.reader.read(tensor for each in names for tensor in self._checked(each))
        layer = layers_from({each: self.entries[each] for each in names}, stored)[name]
        layer.stored_as = name
        return layer

    def float_dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of the float weight from which a layer was quantized. name: on disk"""
        stated = self._entry(name).get("dtype")
        if stated is None:  # version 1 stores it only in the placeholder: equal for all layers
            return self.reader.tensors[self.placeholder].dtype
        dtype: torch.dtype = getattr(torch, stated)
        return dtype

    def shards(self) -> list[Shard]:
        """Returns the content of each file, in the order of the files."""
        placed = self.reader.tensors
        layers: dict[str, list[str]] = {file: [] for file in self.reader.files}
        others: dict[str, list[str]] = {file: [] for file in self.reader.files}
        quantized = {self.placeholder}
        for name in self.entries:
            tensors = self._checked(name)
            quantized.update(tensors)
            layers[placed[tensors[0]].file].append(name)
        for name, info in placed.items():
            if name not in quantized:
                others[info.file].append(name)
        return [Shard(file, tuple(layers[file]), tuple(others[file])) for file in self.reader.files]

    def converted_shards(
        self, convert: Convert, progress: Progress = lambda done, of: None
    ) -> Iterator[dict[str, Tensor]]:
        """Yields the tensors of each shard by name on disk, with every quantized layer converted.

        Tensors of no quantized layer are copied; the placeholder is left out. One shard is in
        memory at a time.

        convert: a function of a layer's name on disk and the layer, which returns the tensors to
            store for it, named relative to the layer.
        progress: called as progress(done, total), in shards.
        """
        shards = self.shards()
        progress(0, len(shards))
        for done, shard in enumerate(shards, 1):
            tensors = self.reader.read(shard.others)
            for name in shard.layers:
                converted = convert(name, self.layer(name))
                tensors |= {f"{name}.{key}": tensor for key, tensor in converted.items()}
            yield tensors
            progress(done, len(shards))

    def placeholder_in(self, name: str) -> dict[str, Tensor]:
        """Returns the placeholder as a tensor of a layer, if it has the layer's name."""
        if self.placeholder != f"{name}.weight":
            return {}
        return {"weight": self.reader.read([self.placeholder])[self.placeholder]}

    def tensors_of(self, name: str) -> list[str]:
        """Returns the names on disk of all tensors of one quantized layer. name: on disk"""
        return tensor_names(name, self.entries[name])

    def verify(self, hashes: bool = True, partial: bool = False) -> None:
        """Checks that the folder is as it was written. Raises ValueError if it is not.

        It checks config.json, the sizes of the shards, and that the tensors of every quantized
        layer are there with the right shape and dtype.

        hashes: whether the contents of the shards, and of the other files that loading reads, are
            checked too, by their hashes; this takes longer.
        partial: whether files other than shards may be missing, because transformers has
            downloaded only those that it reads.
        """
        self._check_digest()
        self._check_files(hashes)
        if hashes:
            self._check_other_files(partial)
        for name in self.entries:
            self._checked(name)
            self._check_values(name)
        placeholder = self.reader.tensors.get(self.placeholder)
        if placeholder is None or placeholder.shape != (0,):
            raise ValueError(
                f"{self.folder}: the placeholder {self.placeholder} is missing: it must be an "
                "empty tensor"
            )

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.entries:
            near = get_close_matches(name, self.entries, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.folder} has no quantized layer {name!r}{hint}")
        return self.entries[name]

    def _checked(self, name: str) -> list[str]:
        """Returns `tensors_of` after checking each tensor against the entry."""
        with torch.device("meta"):
            expected = build(self.entries[name]).state_dict()
        for key, tensor in expected.items():
            info = self.reader.tensors.get(f"{name}.{key}")
            if info is None:
                raise ValueError(
                    f"{self.folder}: tensor {name}.{key} is missing: config.json asks for it. Copy "
                    "the folder from its source again"
                )
            try:
                check_tensor(f"{name}.{key}", info.shape, info.dtype, tensor)
            except ValueError as error:
                raise ValueError(f"{self.folder}: {error}") from None
        return [f"{name}.{key}" for key in expected]

    def _check_values(self, name: str) -> None:
        """Raises ValueError if a tensor of a layer holds values that mean nothing."""
        entry = self.entries[name]
        wanted = [f"{name}.{key}" for key in FORMATS[entry["format"]].limited]
        present = [tensor for tensor in wanted if tensor in self.reader.tensors]
        if not present:
            return
        with torch.device("meta"):
            layer = build(entry)
        stored = self.reader.read(present)
        try:
            layer.check_values({k.removeprefix(f"{name}."): v for k, v in stored.items()})
        except ValueError as error:
            file = self.reader.tensors[present[0]].file
            raise ValueError(f"{self.folder / file}: layer {name}: {error}") from None

    def _check_digest(self) -> None:
        stated = self.quantization.get("digest")
        if stated is not None and stated != config_digest(self.config):
            raise ValueError(
                f"{self.folder}/config.json was edited after quantization: restore it, or, if the "
                "change was on purpose, delete its quantization_config.digest"
            )

    def _check_files(self, hashes: bool) -> None:
        stated = self.quantization.get("files")
        if not isinstance(stated, dict):
            raise ValueError(
                f"{self.folder}/config.json: quantization_config.files must give size and sha256 "
                "of each shard. Copy config.json from its source again"
            )
        if sorted(stated) != self.reader.files:
            raise ValueError(
                f"{self.folder} has the shards {self.reader.files}, "
                f"but config.json lists {sorted(stated)}"
            )
        self._check_index()
        for compared in (False, True)[: 1 + hashes]:  # all sizes first, which takes no time
            for file, facts in stated.items():
                problem = problem_of(self.folder, file, facts, compared)
                if problem is not None:
                    raise ValueError(
                        f"{self.folder / file} {problem}: copy it from its source again, or, if "
                        "lowbit quantize made it, run the same command again"
                    )

    def _check_other_files(self, partial: bool) -> None:
        found = loading_problem(self.folder, self.quantization, partial)
        if found is not None:
            name, problem = found
            undo = "remove" if problem == ADDED else "restore"
            raise ValueError(
                f"{self.folder / name} {problem}: {undo} it, or, if the change was on purpose, "
                f"accept it with: lowbit inspect {self.folder} --accept {name}"
            )

    def _check_index(self) -> None:
        """Checks that the index is complete: transformers needs it for layers offloaded to disk."""
        path = self.folder / INDEX
        if not path.is_file():
            return
        index = read_json(path)
        absent = sorted(self.reader.tensors.keys() - index["weight_map"].keys())
        if absent:
            raise ValueError(f"{path} does not list tensor {absent[0]}")
        if not isinstance(index.get("metadata"), dict):
            raise ValueError(f"{path}: 'metadata' must be an object")


def tensor_names(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Returns the names on disk of all tensors of a quantized layer.

    name: of the layer, on disk.
    entry: of the layer, in config.json.
    """
    with torch.device("meta"):
        return [f"{name}.{key}" for key in build(dict(entry)).state_dict()]
