"""The target `gguf`: one file for llama.cpp, Ollama and LM Studio."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.checkpoint.reader import read_json
from lowbit.exporters.exporter import (
    Exporter,
    Progress,
    StoredLayer,
    canonical_names,
    grid_for,
    regrouping,
)
from lowbit.exporters.folder import float_tensor, float_weight
from lowbit.exporters.gguf.architectures import (
    ARCHITECTURES,
    ROPE_FREQS,
    common_keys,
    context_length,
    head_size,
    rope_freqs,
    text_config,
)
from lowbit.exporters.gguf.blocks import (
    ASYMMETRIC,
    BLOCK,
    CODE_BITS,
    block_type,
    encode,
    fits_blocks,
)
from lowbit.exporters.gguf.tokenizer import tokenizer_keys, tokens_without_rows
from lowbit.exporters.grid import Grid, Refused, half_scales
from lowbit.formats.base import QuantizedLinear

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
QUANTIZATION_VERSION = 2
UNUSED = ("rotary_emb.inv_freq",)  # tensors of old folders that nobody reads


class GgufExporter(Exporter):
    """Writes a GGUF file.

    Symmetric layers are exact. Of asymmetric ones llama.cpp stores the smallest weight of a block
    in float16, which rounds it a little. Layers whose rows are not whole blocks stay float.
    """

    name = "gguf"
    readers = "llama.cpp, Ollama, LM Studio"
    tags = ("gguf",)
    library = "gguf"
    packs_tables = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if find_spec("gguf") is None:
            raise ValueError("export to gguf needs the package gguf: pip install 'lowbit[gguf]'")
        kind = self.folder.config.get("model_type")
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"gguf is written for {', '.join(ARCHITECTURES)}, and this model is {kind!r}: "
                "export to dense, and convert that with llama.cpp's own script"
            )
        self.architecture = ARCHITECTURES[kind]
        self.model_config = text_config(self.folder.config)
        self.keys = common_keys(self.architecture, self.model_config)
        self.keys |= tokenizer_keys(
            self.folder.folder, self.model_config["vocab_size"], dict(self.folder.config)
        )
        whole = read_json(self.folder.folder / "tokenizer.json")
        self.lost = tokens_without_rows(whole, self.model_config["vocab_size"])
        self.kinds: dict[str, str] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        context, notes = context_length(self.architecture, self.model_config), list[str]()
        if context < self.model_config["max_position_embeddings"]:
            notes.append(f"the context is cut to {context:,} tokens, the window of its attention")
        if self.lost:
            notes.append(
                f"{len(self.lost)} added tokens, for which the model has no row, are left out of "
                f"the tokenizer: {', '.join(self.lost[:3])}"
            )
        return tuple(notes)

    @property
    def usage(self) -> str:
        return (
            "FILE stands for the file in MODEL that ends in .gguf. In llama.cpp: "
            "`llama-cli -m FILE`, `llama-server -m FILE`. In Ollama: `ollama create NAME -f "
            "Modelfile`, where Modelfile has the line `FROM ./FILE`."
        )

    def store(self, name: str, layer: QuantizedLinear) -> StoredLayer:
        grid = grid_for(self, layer)
        kind, changes = block_type(grid), tuple[str, ...]()
        if kind is None and not self.options.allow_lossy:
            raise Refused(
                f"llama.cpp has no block for asymmetric codes of {grid.bits} bits (it has them for "
                f"{min(ASYMMETRIC)} to {max(ASYMMETRIC)}): --allow-lossy exports it in float16"
            )
        if kind is None or not fits_blocks(grid):
            kind, tensors, changes = self._float(name, grid)
        else:
            tensors = {"weight": encode(_scales(grid, self.options.allow_lossy), kind)}
            changes = regrouping(grid, replace(grid, group_size=BLOCK, bits=CODE_BITS[kind]))
        tensors["weight"] = tensors["weight"][self._rows(name, grid.out_features)]
        if layer.bias is not None:
            rows = self._rows(name, grid.out_features)
            tensors["bias"] = layer.bias.detach().float()[rows]
        self.kinds[name] = kind
        return StoredLayer(kind, tensors, changes)

    def _float(self, name: str, grid: Grid) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
        dtype = self.options.float_dtype or torch.float32
        if block_type(grid) is None:
            dtype = self.options.float_dtype or torch.float16
        changes = () if fits_blocks(grid) else (f"rows of {grid.in_features} are not whole blocks",)
        return FLOATS[dtype], {"weight": float_weight(grid.weight(), dtype)}, changes

    def _rows(self, name: str, rows: int) -> Tensor:
        """Returns the order in which llama.cpp stores the rows of a layer."""
        order = torch.arange(rows)
        owner = name.rpartition(".")[2]
        if not self.architecture.permuted or owner not in ("q_proj", "k_proj"):
            return order
        return order.unflatten(0, (-1, 2, head_size(self.model_config) // 2)).mT.flatten()

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        from gguf import GGMLQuantizationType, quants

        kind, stored = self.kinds[name], tensors["weight"]
        if kind in FLOATS.values():
            weight = stored.float()
        else:
            made = quants.dequantize(stored.numpy(), GGMLQuantizationType[kind])
            weight = torch.from_numpy(made.astype(np.float32))
        original = torch.empty_like(weight)
        original[self._rows(name, len(weight))] = weight
        return original

    def write(self, into: Path, progress: Progress) -> None:
        from gguf import GGMLQuantizationType, GGUFWriter

        name = into.name.removesuffix(".part")
        writer = GGUFWriter(into / f"{name}.gguf", self.architecture.name)
        for key, value in self._all_keys(name).items():
            _add_key(writer, key, value)
        for stored, shape, kind in self._layout():
            element = GGMLQuantizationType[kind]
            size = _row_bytes(shape[-1], kind) * int(np.prod(shape[:-1], dtype=np.int64))
            if kind in FLOATS.values():
                writer.add_tensor_info(stored, shape, np.dtype(np.float32), size, element)
            else:
                bytes_shape = (*shape[:-1], _row_bytes(shape[-1], kind))
                writer.add_tensor_info(stored, bytes_shape, np.dtype(np.uint8), size, element)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in self._data(progress):
            writer.write_tensor_data(data)
        writer.close()

    def _all_keys(self, name: str) -> dict[str, Any]:
        most, _ = Counter(self.kinds.values()).most_common(1)[0]
        general = {
            "general.name": name,
            "general.file_type": FILE_TYPES[most],
            "general.quantization_version": QUANTIZATION_VERSION,
        }
        return general | self.keys

    @cached_property
    def _tensors(self) -> list[tuple[str, str | None, str]]:
        """Name in the file, layer if it is quantized, and source of every tensor."""
        renamed = canonical_names(self.folder)
        tied = bool(self.folder.config.get("tie_word_embeddings"))
        found: list[tuple[str, str | None, str]] = []
        for shard in self.folder.shards():
            for source in shard.others:
                name = renamed.get(source, source)
                if name.endswith(UNUSED) or (tied and name == "lm_head.weight"):
                    continue
                found.append((self._target(name), None, source))
            for layer in shard.layers:
                found.append((self._target(f"{layer}.weight"), layer, "weight"))
                if self.folder.entries[layer]["bias"] is not None:
                    found.append((self._target(f"{layer}.bias"), layer, "bias"))
        return found

    def _target(self, name: str) -> str:
        """Returns the name of a tensor in the file. Raises ValueError if llama.cpp has none."""
        from gguf import MODEL_ARCH, get_tensor_name_map

        arch = MODEL_ARCH[self.architecture.name.upper()]
        blocks = self.model_config["num_hidden_layers"]
        found = get_tensor_name_map(arch, blocks).get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp's {self.architecture.name} has no tensor for {name}")
        return str(found)

    def _layout(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yields name, shape and kind of every tensor, in the order of the data."""
        if (factors := rope_freqs(self.model_config)) is not None:
            yield ROPE_FREQS, tuple(factors.shape), "F32"
        for name, layer, source in self._tensors:
            if layer is None:
                info = self.folder.reader.tensors[source]
                yield name, info.shape, self._float_kind(info.shape, info.dtype)
            elif source == "bias":
                yield name, (self.folder.entries[layer]["shape"][0],), "F32"
            else:
                yield name, tuple(self.folder.entries[layer]["shape"]), self.kinds[layer]

    def _float_kind(self, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """Returns how a tensor of no quantized layer is stored; llama.cpp wants vectors in F32."""
        return "F32" if len(shape) < 2 else FLOATS[self.options.float_dtype or dtype]

    def _data(self, progress: Progress) -> Iterator[Any]:
        """Yields the data of every tensor, in the order of `_layout`."""
        if (factors := rope_freqs(self.model_config)) is not None:
            yield factors.numpy()
        last: tuple[str, dict[str, Tensor]] = ("", {})
        for done, (name, layer, source) in enumerate(self._tensors):
            progress(done, len(self._tensors))
            if layer is None:
                yield self._float_data(name, source)
                continue
            if last[0] != layer:
                last = layer, self.store(layer, self.layer(layer)).tensors
            yield _raw(last[1][source])
        progress(len(self._tensors), len(self._tensors))

    def _float_data(self, name: str, source: str) -> Any:
        tensor = self.folder.reader.read([source])[source]
        kind = self._float_kind(tuple(tensor.shape), tensor.dtype)
        dtype = next(dtype for dtype, named in FLOATS.items() if named == kind)
        if "norm" in name and name.endswith(".weight"):
            tensor = tensor.float() + self.architecture.norm_offset
        owner = source.rpartition(".")[0]
        return _raw(float_tensor(source, tensor[self._rows(owner, len(tensor))], dtype))

    def read(self, folder: Path, name: str) -> dict[str, Tensor]:
        stored = self._written(folder)
        found = {}
        for target, layer, source in self._tensors:
            if layer == name:
                found[source] = self._tensor_of(stored[target])
        return found

    def floats(self, folder: Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        stored = self._written(folder)
        for name, layer, source in self._tensors:
            if layer is None:
                found = self._tensor_of(stored[name]) if name in stored else None
                wanted = torch.from_numpy(self._float_data(name, source))
                if found is not None and found.dtype == torch.bfloat16:
                    wanted = wanted.view(torch.bfloat16)
                yield name, wanted, found

    def _written(self, folder: Path) -> dict[str, Any]:
        """Returns the tensors of the written file by name; they are mapped, not read."""
        from gguf import GGUFReader

        if getattr(self, "_file", None) is None:
            files = sorted(folder.glob("*.gguf"))
            if len(files) != 1:
                raise ValueError(f"{folder} has {len(files)} files *.gguf instead of one")
            self._file = {tensor.name: tensor for tensor in GGUFReader(files[0]).tensors}
        return self._file

    def _tensor_of(self, stored: Any) -> Tensor:
        data = torch.from_numpy(np.array(stored.data))
        return data.view(torch.bfloat16) if stored.tensor_type.name == "BF16" else data


def _scales(grid: Grid, allow_lossy: bool) -> Grid:
    return grid if allow_lossy else half_scales(grid)


def _row_bytes(count: int, kind: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return count // elements * size


def _raw(tensor: Tensor) -> Any:
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _add_key(writer: Any, key: str, value: Any) -> None:
    """Adds a key to a file; the type of the value decides its type there."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
