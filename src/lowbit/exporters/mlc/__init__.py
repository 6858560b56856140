"""The target `mlc`: MLC-LLM's layout q4f16_2, for phones, browsers and GPUs.

Of a matrix of (out, in), with `groups` = ceil(in / 32), it stores:

| name       | dtype   | shape             | holds                                            |
| ---------- | ------- | ----------------- | ------------------------------------------------ |
| `q_weight` | uint32  | (out, 4 * groups) | eight numbers of a row in each word, low first   |
| `q_scale`  | float16 | (out, groups)     |                                                  |

    weight = q_scale * (number - 7)

The numbers are 15 - code and q_scale is -scale, so that 7 stands where lowbit's symmetric codes
have 8. Rows that are no multiple of 32 are filled up. The matrices of queries, keys and values, and
those of gate and up, are stacked by rows. The embedding and the output layer are float16.

Source: github.com/mlc-ai/mlc-llm, python/mlc_llm/quantization/group_quantization.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowbit.checkpoint.companions import copy_companions
from lowbit.checkpoint.writer import write_json
from lowbit.exporters.exporter import Exporter, Progress, StoredLayer, grid_for, regrouping
from lowbit.exporters.folder import float_weight
from lowbit.exporters.grid import Grid, Refused, divides, half_scales, widened
from lowbit.exporters.mlc.chat_config import chat_config, context_length
from lowbit.exporters.mlc.names import ARCHITECTURES, HEAD, targets
from lowbit.exporters.mlc.tensor_cache import CacheReader, write_cache
from lowbit.formats.base import QuantizedLinear

QUANTIZATION = "q4f16_2"
BITS, GROUP, NUMBERS_OF_A_WORD = 4, 32, 8
ZERO = 7  # the number that stands for a weight of 0
AWQ_GROUP = 128


class MlcExporter(Exporter):
    """Writes MLC's q4f16_2: symmetric layers of 2 to 4 bits in groups of 32, or multiples, or rows.

    The published model libraries of MLC are for other layouts, so you have to compile one.
    """

    name = "mlc"
    readers = "MLC-LLM"
    tags = ("mlc-llm",)
    library = "mlc-llm"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        kind = self.folder.config.get("model_type")
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"mlc is written for {', '.join(ARCHITECTURES)}, and this model is {kind!r}: "
                "export to dense, and convert that with mlc_llm convert_weight"
            )
        if self.options.dtype not in (None, "float16"):
            raise ValueError(f"dtype is {self.options.dtype}, and {QUANTIZATION} has float16 only")
        self.architecture = ARCHITECTURES[kind]
        self.targets = targets(self.folder, self.architecture)
        self.chat_config = chat_config(self.folder, self.architecture, QUANTIZATION)
        self._cache: CacheReader | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [
            *super().notes,
            f"MLC needs a model library for {QUANTIZATION}: mlc_llm compile DEST --device DEVICE "
            "-o LIBRARY, or let MLC compile it when it loads the folder",
            "conv_template in mlc-chat-config.json holds no chat template; to chat, replace it by "
            "the one of MLC that fits the model",
        ]
        context, full = context_length(self.folder), self.folder.config["max_position_embeddings"]
        if context < full:
            notes.append(f"the context is cut to {context:,} tokens, the window of its attention")
        return tuple(notes)

    @property
    def usage(self) -> str:
        return (
            "In MLC-LLM, which compiles a model library for the device first: "
            "`mlc_llm compile MODEL --device DEVICE -o LIBRARY`, then "
            "`mlc_llm chat MODEL --model-lib LIBRARY`."
        )

    def store(self, name: str, layer: QuantizedLinear) -> StoredLayer:
        grid = grid_for(self, layer)
        if layer.bias is not None and not self.architecture.has_bias(name):
            raise Refused(f"it has a bias, and MLC's {self.architecture.name} has none there")
        if name == HEAD:
            return self._float(grid)
        changed = _fitting(grid)
        tensors = _packed(changed)
        if layer.bias is not None:
            tensors["bias"] = float_weight(layer.bias.detach(), torch.float16)
        changes = regrouping(grid, replace(changed, group_size=GROUP))
        return StoredLayer(QUANTIZATION, tensors, changes)

    def _float(self, grid: Grid) -> StoredLayer:
        weight = float_weight(grid.weight(), torch.float16)
        return StoredLayer("float16", {"weight": weight}, (f"float in {QUANTIZATION}",))

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if "weight" in tensors:
            return tensors["weight"].float()
        columns = self.folder.entries[name]["shape"][1]
        words = tensors["q_weight"].numpy().view(np.uint32)
        shifts = np.arange(0, 32, BITS, dtype=np.uint32)
        numbers = (words[:, :, None] >> shifts & np.uint32(15)).reshape(len(words), -1)
        steps = numbers.astype(np.float32)[:, :columns] - ZERO
        scale = np.repeat(tensors["q_scale"].float().numpy(), GROUP, axis=1)[:, :columns]
        return torch.from_numpy(scale * steps)

    def _part_of(self, name: str) -> tuple[str, slice]:
        """Returns the stacked matrix that a layer is part of, and its rows there."""
        fused, layers = self.architecture.fused(name)
        start = 0
        for layer in layers:
            rows = self.folder.entries[layer]["shape"][0]
            if layer == name:
                return fused, slice(start, start + rows)
            start += rows
        raise AssertionError(name)

    def write(self, into: Path, progress: Progress) -> None:
        write_cache(into, self._tensors(progress))
        write_json(into / "mlc-chat-config.json", self.chat_config)
        copy_companions(self.folder.folder, into)

    def _tensors(self, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Yields name and data of every tensor; the parts of one matrix are in memory at a time."""
        last: tuple[tuple[str, ...], list[dict[str, Tensor]]] = ((), [])
        for done, (name, target) in enumerate(self.targets.items()):
            progress(done, len(self.targets))
            if target.key is None:
                (source,) = target.sources
                stored = self.folder.reader.read([source])[source]
                yield name, _half(source, stored)
                continue
            if last[0] != target.sources:
                last = target.sources, [self._stored(layer) for layer in target.sources]
            yield name, torch.cat([part[target.key] for part in last[1]])
        progress(len(self.targets), len(self.targets))

    def _stored(self, layer: str) -> dict[str, Tensor]:
        return self.store(layer, self.layer(layer)).tensors

    def read(self, folder: Path, name: str) -> dict[str, Tensor]:
        cache = self._cache_of(folder)
        if name == HEAD:
            return {"weight": cache.read(f"{HEAD}.weight")}
        fused, rows = self._part_of(name)
        keys = [key for key in ("q_weight", "q_scale", "bias") if f"{fused}.{key}" in self.targets]
        return {key: cache.read(f"{fused}.{key}")[rows] for key in keys}

    def floats(self, folder: Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        cache = self._cache_of(folder)
        for name, target in self.targets.items():
            if target.key is None:
                (source,) = target.sources
                wanted = _half(source, self.folder.reader.read([source])[source])
                yield name, wanted, cache.read(name) if name in cache.records else None

    def _cache_of(self, folder: Path) -> CacheReader:
        if self._cache is None or self._cache.folder != folder:
            self._cache = CacheReader(folder)
        return self._cache


def _fitting(grid: Grid) -> Grid:
    """Returns the grid with 4 bits. Raises Refused for what q4f16_2 cannot hold."""
    grid = half_scales(grid)
    if not grid.symmetric:
        whole = grid.zero_shift == 0 and grid.bits <= BITS and divides(grid, AWQ_GROUP)
        raise Refused(
            f"it is asymmetric, and {QUANTIZATION} is symmetric: "
            + (
                "export it with --to awq, and give that to MLC: mlc_llm convert_weight DEST "
                "--quantization q4f16_autoawq --source-format awq "
                "--source DEST/model.safetensors.index.json --output MLC"
                if whole
                else "quantize with symmetric codes of at most 4 bits"
            )
        )
    if grid.bits > BITS:
        raise Refused(
            f"it has codes of {grid.bits} bits, and {QUANTIZATION} has {BITS}: quantize with at "
            f"most {BITS} bits"
        )
    if not grid.per_row and grid.group_size % GROUP:
        raise Refused(
            f"it has groups of {grid.group_size} inputs, and {QUANTIZATION} groups of {GROUP}: "
            f"quantize with group_size {GROUP}, a multiple, or none"
        )
    return widened(grid, BITS)


def _packed(grid: Grid) -> dict[str, Tensor]:
    missing = -grid.in_features % GROUP
    numbers = functional.pad(15 - grid.codes.to(torch.int64), (0, missing), value=ZERO)
    eights = numbers.unflatten(1, (-1, NUMBERS_OF_A_WORD))
    words = (eights << torch.arange(0, 32, BITS)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    first = torch.arange(0, grid.in_features, GROUP) // grid.group_size
    return {"q_weight": words.view(torch.uint32), "q_scale": -grid.scale[:, first]}


def _half(name: str, tensor: Tensor) -> Tensor:
    try:
        return float_weight(tensor, torch.float16)
    except Refused:
        raise ValueError(
            f"tensor {name} has numbers that float16 cannot hold, and MLC's {QUANTIZATION} stores "
            "float16: export to ct or mlx"
        ) from None
