"""The base class of targets whose folders look like the hub's: safetensors and config.json."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.companions import copy_companions
from lowbit.checkpoint.folder import write_model
from lowbit.checkpoint.reader import CheckpointReader
from lowbit.exporters.exporter import Exporter, Progress
from lowbit.exporters.grid import Refused
from lowbit.formats.base import QuantizedLinear

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"


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
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

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
        section = self.quantization()
        return config if section is None else config | {"quantization_config": section}

    def read(self, folder: Path, name: str) -> dict[str, Tensor]:
        reader = self._reader_of(folder)
        mine = [key for key in reader.tensors if key.startswith(f"{name}.")]
        return {key.removeprefix(f"{name}."): value for key, value in reader.read(mine).items()}

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
        renamed = self._canonical_names()
        for shard in self.folder.converted_shards(self._converted, progress):
            yield {
                renamed.get(name, name): tensor.contiguous()
                for name, tensor in self._all_float(shard)
            }

    def _all_float(self, shard: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in shard.items():
            layer = name.rpartition(".")[0]
            stays = layer not in self.folder.entries
            yield name, self.store_float(name, tensor) if stays else tensor

    def _converted(self, name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
        return self.store(name, self.at_width(name, layer)).tensors

    def _canonical_names(self) -> dict[str, str]:
        """Returns new names for tensors: other programs look for a tied table as the embedding.

        A folder whose tied table is stored as the output layer alone loads in transformers only.
        """
        names = self.folder.reader.tensors
        if not self.folder.config.get("tie_word_embeddings") or HEAD not in names:
            return {}
        if any(name.endswith(EMBEDDING) for name in names):
            return {}
        prefix = {name.split(".layers.")[0] for name in self.folder.entries if ".layers." in name}
        return {HEAD: f"{prefix.pop()}.{EMBEDDING}"} if len(prefix) == 1 else {}


def float_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in a float dtype. Raises Refused where the dtype cannot hold its range."""
    cast = weight.to(dtype)
    if bool(torch.isinf(cast).any()) and not bool(torch.isinf(weight).any()):
        raise Refused(f"its weights are too large for {dtype}: choose another with --dtype")
    return cast
