"""Read a folder that lowbit has quantized: layer by layer, shard by shard, without a model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.layers import check_tensor, layers_from
from lowbit.checkpoint.reader import INDEX, CheckpointReader, file_sha256, read_json
from lowbit.checkpoint.verify import (
    config_digest,
    guard_of,
    quantization_section,
    quantized_entries,
    read_config,
    rounded_attentions,
)
from lowbit.formats import build
from lowbit.formats.base import QuantizedLinear

Progress = Callable[[int, int], None]  # shards done, shards of
Convert = Callable[[str, QuantizedLinear], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Shard:
    """What one file of a quantized folder holds.

    file: its name.
    layers: the quantized layers, by name on disk; a layer is in the shard of its first tensor.
    others: the tensors that belong to no quantized layer; the guard tensor is left out.
    """

    file: str
    layers: tuple[str, ...]
    others: tuple[str, ...]


class QuantizedFolder:
    """A folder that lowbit has quantized.

    config: config.json.
    quantization: its quantization_config.
    entries: what that says of every quantized layer, by name on disk.
    attention: how attentions round what they read, by name on disk.
    guard: the name of the empty tensor that makes plain transformers refuse the folder.
    reader: the tensors on disk.

    Raises ValueError where config.json or a header cannot be; `verify` checks the rest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.quantization = quantization_section(self.config, folder)
        self.entries = quantized_entries(self.quantization, folder)
        self.attention = rounded_attentions(self.quantization, folder)
        self.guard = guard_of(self.quantization, self.entries, folder)
        self.reader = CheckpointReader(folder)

    def layer(self, name: str) -> QuantizedLinear:
        """A quantized layer with its tensors, linked to the layer that it shares with.

        name: on disk. Raises ValueError for a name that is not quantized, and where a tensor is
        missing or has not the shape and dtype that the entry asks for.
        """
        names = [name]
        if (owner := self._entry(name).get("shares")) is not None:
            names.append(owner)
        stored = self.reader.read(tensor for each in names for tensor in self._checked(each))
        layer = layers_from({each: self.entries[each] for each in names}, stored)[name]
        layer.stored_as = name
        return layer

    def float_dtype(self, name: str) -> torch.dtype:
        """The dtype of the float weight that a quantized layer stands for; name: on disk."""
        stated = self._entry(name).get("dtype")
        if stated is None:  # a folder of version 1: all layers had the dtype of the guard tensor
            return self.reader.tensors[self.guard].dtype
        dtype: torch.dtype = getattr(torch, stated)
        return dtype

    def shards(self) -> list[Shard]:
        """What each file holds, in the order of the files."""
        placed = self.reader.tensors
        layers: dict[str, list[str]] = {file: [] for file in self.reader.files}
        others: dict[str, list[str]] = {file: [] for file in self.reader.files}
        quantized = {self.guard}
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
        """The folder's shards by tensor name, with other tensors in the places of its layers.

        convert: makes of a layer's name and the layer the tensors that take its place, named
            relative to the layer. What is not quantized is copied, the guard tensor left out.

        One shard is in memory at a time.
        """
        shards = self.shards()
        progress(0, len(shards))
        for done, shard in enumerate(shards, 1):
            tensors = self.reader.read(shard.others)
            for name in shard.layers:
                made = convert(name, self.layer(name))
                tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
            yield tensors
            progress(done, len(shards))

    def tensors_of(self, name: str) -> list[str]:
        """Names on disk of all tensors of one quantized layer."""
        with torch.device("meta"):
            return [f"{name}.{key}" for key in build(self.entries[name]).state_dict()]

    def verify(self, hashes: bool = True) -> None:
        """Raises ValueError where the folder is not as it was written.

        Checked are config.json, the sizes of the shards, the tensors of every quantized layer, and
        with `hashes`, which takes longer, the contents of the shards.
        """
        self._check_digest()
        self._check_files(hashes)
        for name in self.entries:
            self._checked(name)
        guard = self.reader.tensors.get(self.guard)
        if guard is None or guard.shape != (0,):
            raise ValueError(f"{self.folder}: the empty tensor {self.guard} is missing")

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.entries:
            near = get_close_matches(name, self.entries, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.folder} has no quantized layer {name!r}{hint}")
        return self.entries[name]

    def _checked(self, name: str) -> list[str]:
        """`tensors_of`; ValueError where one of them is missing or does not fit the entry."""
        with torch.device("meta"):
            expected = build(self.entries[name]).state_dict()
        for key, place in expected.items():
            info = self.reader.tensors.get(f"{name}.{key}")
            if info is None:
                raise ValueError(f"{self.folder}: tensor {name}.{key} is missing")
            try:
                check_tensor(f"{name}.{key}", info.shape, info.dtype, place)
            except ValueError as error:
                raise ValueError(f"{self.folder}: {error}") from None
        return [f"{name}.{key}" for key in expected]

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
