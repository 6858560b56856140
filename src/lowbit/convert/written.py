"""Writes a folder of converted layers, one shard for each file of the checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo
from lowbit.checkpoint.card_facts import write_card
from lowbit.checkpoint.companions import copy_companions
from lowbit.version import __version__

Parts = Mapping[str, TensorInfo]  # of a layer, by name within the layer
# Name of a layer and the dtype of its float weight -> its entry and its tensors in lowbit's format.
Convert = Callable[[str, torch.dtype], tuple[dict[str, Any], dict[str, Tensor]]]


def write_converted(
    reader: CheckpointReader,
    layers: Mapping[str, Parts],
    convert: Convert,
    method: dict[str, Any],
    out: Path,
    code: bool,
) -> None:
    """Writes the folder; a layer goes to the shard of the file that holds its first part.

    reader: of the checkpoint.
    layers: the tensors of each layer that is converted, by the layer's name on disk.
    convert: converts one layer.
    method: how the layers were made, for made_by in config.json.
    code: whether the Python code of the model is copied too.
    """
    inside = {f"{name}.{part}" for name, parts in layers.items() for part in parts}
    plain = {name: info.file for name, info in reader.tensors.items() if name not in inside}
    quantized = {name: next(iter(parts.values())).file for name, parts in layers.items()}
    files = sorted({*plain.values(), *quantized.values()})
    made_by = {
        "source": reader.folder.resolve().name,
        "method": method,
        "model": reader.digest(),
        "versions": {"lowbit": __version__},
    }
    first, dtype = next(iter(layers)), float_dtype(reader, plain)
    with CheckpointWriter(out, made_by, len(files)) as writer:
        for index, file in enumerate(files):
            tensors = reader.read([name for name, its_file in plain.items() if its_file == file])
            modules: dict[str, dict[str, Any]] = {}
            for name in (name for name, its_file in quantized.items() if its_file == file):
                modules[name], converted = convert(name, dtype)
                tensors |= {f"{name}.{key}": tensor for key, tensor in converted.items()}
            placeholder = f"{first}.weight" if first in modules else None
            if placeholder is not None:
                tensors[placeholder] = torch.empty(0, dtype=dtype)
            writer.write_shard(index, tensors, None, {"modules": modules, "marker": placeholder})
        writer.finish(
            reader.folder,
            made_by,
            copy_companions(reader.folder, out, code),
            lambda config: write_card(out, config, reader.folder),
        )


def float_dtype(reader: CheckpointReader, plain: Mapping[str, str]) -> torch.dtype:
    """Returns the dtype of the largest float tensor that is not quantized, as that of the model.

    plain: names of the tensors that are not quantized.
    """
    floats = [
        reader.tensors[name] for name in plain if reader.tensors[name].dtype.is_floating_point
    ]
    return max(floats, key=lambda info: info.bytes).dtype if floats else torch.float16
