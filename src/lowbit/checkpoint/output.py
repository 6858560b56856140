"""Makes config.json of a quantized folder, and computes the size of a folder in bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lowbit.checkpoint.hashes import FILES, OTHER_FILES
from lowbit.checkpoint.provenance import without_paths
from lowbit.checkpoint.quantized_folder import QuantizedFolder, tensor_names
from lowbit.checkpoint.ranges import collapse
from lowbit.checkpoint.reader import CheckpointReader, read_json
from lowbit.checkpoint.recognize import runnable_folder
from lowbit.checkpoint.verify import VERSION, config_digest

Record = Mapping[str, Any]


def final_config(
    source: Path,
    records: Sequence[Record],
    made_by: dict[str, Any],
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns config.json of the source with a quantization_config.

    source: the folder of the float model.
    records: the records of all shards, in order.
    made_by: how the folder was made: method, calibration, versions.
    others: size and sha256 of all other files, by name.

    Raises ValueError if no layer was quantized.
    """
    modules = {name: entry for r in records for name, entry in r.get("modules", {}).items()}
    marker = next((r["marker"] for r in records if r.get("marker")), None)
    if marker is None:  # at most tables of embeddings are packed
        raise ValueError("no linear was quantized: all of them were skipped or left in float")
    attention = {name: how for r in records for name, how in r.get("attention", {}).items()}
    section = {
        "quant_method": "lowbit",
        "version": VERSION,
        "marker": marker,
        "modules": collapse(modules),
        **({"attention": collapse(attention)} if attention else {}),
        FILES: {r["file"]: {"size": r["size"], "sha256": r["sha256"]} for r in records},
        OTHER_FILES: dict(others),
        "made_by": made_by,
    }
    changed = {key: value for r in records for key, value in r.get("config", {}).items()}
    stated = without_paths(read_json(source / "config.json"))
    config = {**stated, **changed, "quantization_config": section}
    section["digest"] = config_digest(config)
    return config


@dataclass(frozen=True)
class Size:
    """The size of a model folder, from the bytes on disk.

    linears: bits per weight of the quantized linears, scales and zero points included, biases not;
        for a float model: bits per weight of the whole model.
    model: bits per parameter of the whole model.
    bytes: size of all shards, their headers included.
    """

    linears: float
    model: float
    bytes: int


def size_of(folder: Path) -> Size:
    """Returns the size of a float or quantized folder; only the headers of its shards are read."""
    found = runnable_folder(folder)
    entries = {} if found.program is None else QuantizedFolder(folder).entries
    return size_of_tensors(found.reader, entries)


def size_of_tensors(reader: CheckpointReader, entries: Mapping[str, Record]) -> Size:
    """Returns the size of a folder from its tensors and the entries of its quantized layers.

    entries: by name on disk; empty for a float model.
    """
    stored = sum((reader.folder / file).stat().st_size for file in reader.files)
    entries = {name: entry for name, entry in entries.items() if entry["format"] != "dense"}
    packed = {n: name for name, entry in entries.items() for n in tensor_names(name, entry)}
    packed = {n: name for n, name in packed.items() if n != f"{name}.bias"}
    weights = sum(prod(entry["shape"]) for entry in entries.values())
    weights += sum(prod(info.shape) for name, info in reader.tensors.items() if name not in packed)
    whole = 8 * reader.stored_bytes / max(weights, 1)
    linears = {name for name, entry in entries.items() if entry["format"] != "embedding"}
    if not linears:
        return Size(whole, whole, stored)
    linear_weights = sum(prod(entries[name]["shape"]) for name in linears)
    linear_bytes = sum(reader.tensors[n].bytes for n, name in packed.items() if name in linears)
    return Size(8 * linear_bytes / linear_weights, whole, stored)
