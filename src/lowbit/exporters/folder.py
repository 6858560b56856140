"""The base class of targets whose folders look like the hub's: safetensors and config.json."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.companions import copy_companions
from lowbit.checkpoint.folder import write_model
from lowbit.checkpoint.reader import CheckpointReader, read_json
from lowbit.exporters.exporter import Exporter, Progress, canonical_names
from lowbit.exporters.grid import Refused
from lowbit.formats.base import QuantizedLinear

CONFIG = "config.json"
SECTIONS = ("quantization_config", "quantization")  # mlx-lm reads the second


class FolderExporter(Exporter):
    """Writes shards of safetensors, config.json and the tokenizer."""

    _written: CheckpointReader | None = None

    @abstractmethod
    def quantization(self) -> dict[str, Any] | None:
        """Returns the quantization_config of the new config.json; None: it has none.

        Called after `store` has been called for every layer.
        """

    def store_float(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor that belongs to no quantized layer, in the dtype that was chosen."""
        dtype = self.options.float_dtype
        return tensor if dtype is None else float_tensor(name, tensor, dtype)

    def write(self, into: Path, progress: Progress) -> None:
        count = len(self.folder.reader.files)
        write_model(into, self._shards(progress), count, lambda _: self.config())
        copy_companions(self.folder.folder, into)

    def config(self) -> dict[str, Any]:
        """Returns the new config.json."""
        config = {k: v for k, v in self.folder.config.items() if k != "quantization_config"}
        if self.options.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = self.options.dtype
        config |= _earlier_rope(config)
        section = self.quantization()
        return config if section is None else config | {"quantization_config": section}

    def misdescribed(self, folder: Path) -> str | None:
        found, wanted = read_json(folder / CONFIG), json.loads(json.dumps(self.config()))
        for key in SECTIONS:
            if not isinstance(found, dict) or found.get(key) != wanted.get(key):
                return f"{CONFIG}: {key} is not what the export writes"
        return None

    def read(self, folder: Path, name: str) -> dict[str, Tensor]:
        reader = self._reader_of(folder)
        mine = [key for key in reader.tensors if key.startswith(f"{name}.")]
        return {key.removeprefix(f"{name}."): value for key, value in reader.read(mine).items()}

    def floats(self, folder: Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        renamed, reader = canonical_names(self.folder), self._reader_of(folder)
        for shard in self.folder.shards():
            for source in shard.others:
                name = renamed.get(source, source)
                wanted = self.store_float(source, self.folder.reader.read([source])[source])
                yield name, wanted, reader.read([name])[name] if name in reader.tensors else None

    def float_modules(self) -> list[str]:
        """Returns the names of all modules with a float matrix, which readers must not convert."""
        stored = self.folder.reader.tensors
        others = [name for shard in self.folder.shards() for name in shard.others]
        modules = {
            name.removesuffix(".weight")
            for name in others
            if name.endswith(".weight") and len(stored[name].shape) == 2
        }
        return sorted(modules | {"lm_head"} - self.folder.entries.keys())

    def _reader_of(self, folder: Path) -> CheckpointReader:
        """Returns a reader of a written folder, whose headers are read once."""
        if self._written is None or self._written.folder != folder:
            self._written = CheckpointReader(folder)
        return self._written

    def _shards(self, progress: Progress) -> Iterator[dict[str, Tensor]]:
        renamed = canonical_names(self.folder)
        for shard in self.folder.converted_shards(self._converted, progress):
            tensors = self.arranged(dict(self._all_float(shard)))
            yield {renamed.get(name, name): t.contiguous() for name, t in tensors.items()}

    def arranged(self, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of a shard under the names that the target's readers look for."""
        return shard

    def _all_float(self, shard: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in shard.items():
            layer = name.rpartition(".")[0]
            stays = layer not in self.folder.entries
            yield name, self.store_float(name, tensor) if stays else tensor

    def _converted(self, name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
        return self.store(name, self.at_width(name, layer)).tensors


def _earlier_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the rotary embedding under the names of transformers 4.

    mlx-lm and MLC read these names only, and take a base of 10,000 where they are missing.
    """
    settings = config.get("rope_parameters")
    if not isinstance(settings, dict) or "rope_theta" not in settings:
        return {}
    scaling = {k: v for k, v in settings.items() if k != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    earlier = {"rope_theta": settings["rope_theta"], "rope_scaling": None if plain else scaling}
    return {key: value for key, value in earlier.items() if config.get(key) is None}


def float_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor in a float dtype, or as it is if it holds integers.

    Raises Refused, with its name, where the dtype cannot hold its range.
    """
    if not tensor.is_floating_point():
        return tensor
    try:
        return float_weight(tensor, dtype)
    except Refused:
        raise Refused(
            f"tensor {name} has values that are too large for {dtype}: choose another with --dtype"
        ) from None


def float_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in a float dtype. Raises Refused where the dtype cannot hold its range."""
    cast = weight.to(dtype)
    if bool(torch.isinf(cast).any()) and not bool(torch.isinf(weight).any()):
        raise Refused(f"its weights are too large for {dtype}: choose another with --dtype")
    return cast
