"""What slices of a folder that matquant made would take, without writing one."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint.output import Size, size_of
from lowbit.checkpoint.verify import QuantizedFolder, read_config
from lowbit.formats.nested import NestedLinear, tensor_bytes
from lowbit.formats.nested.widths import WidthPlan, choose_widths, sliced_entries


def nested_entries(folder: QuantizedFolder) -> dict[str, dict[str, Any]]:
    """The entries of all nested layers, by name on disk."""
    return {n: e for n, e in folder.entries.items() if e["format"] == NestedLinear.format}


def has_masters(folder: Path) -> bool:
    """Whether a folder, of any kind, has layers that run at more widths than one."""
    section = read_config(folder).get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != "lowbit":
        return False
    entries = nested_entries(QuantizedFolder(folder))
    return any(entry["resident"] == "master" for entry in entries.values())


def widths_of(folder: QuantizedFolder, bits: WidthPlan) -> dict[str, int]:
    """The width of every nested layer, by name on disk; bits: as `choose_widths` takes it.

    Raises ValueError, by the name of the layer, where a folder holds a slice of another width.
    """
    entries = nested_entries(folder)
    widths = choose_widths({name: entry["bits"] for name, entry in entries.items()}, bits)
    for name, entry in entries.items():
        if entry["resident"] == "slice" and entry["bits"] != widths[name]:
            raise ValueError(
                f"layer {name}: it is a slice of {entry['bits']} bits: another, of {widths[name]} "
                "bits, can only be cut from the master"
            )
    return widths


def slices_of(folder: QuantizedFolder, bits: WidthPlan | None) -> dict[str, dict[str, Any]]:
    """Entries of the slices that take the place of the folder's masters, by name on disk."""
    if bits is None:
        return {}
    return sliced_entries(folder.entries, bits, lambda name: read_master(folder, name))


def read_master(folder: QuantizedFolder, name: str) -> Tensor:
    """The 8-bit codes of one layer, (out, in) uint8."""
    return folder.reader.read([f"{name}.master"])[f"{name}.master"]


def size_of_slice(folder: Path, bits: WidthPlan) -> Size:
    """What `size_of` would say of a folder with these slices in the place of the masters.

    With extra precision the masters are read, for its overflow depends on the codes.
    """
    whole, quantized = size_of(folder), QuantizedFolder(folder)
    saved = sum(
        tensor_bytes(**quantized.entries[name]) - tensor_bytes(**entry)
        for name, entry in slices_of(quantized, bits).items()
    )
    stored = sum(info.bytes for info in quantized.reader.tensors.values())
    return Size(
        whole.linears - 8 * saved / linear_weights(quantized),
        whole.model * (1 - saved / stored),
        whole.bytes - saved,
    )


def linear_weights(folder: QuantizedFolder) -> int:
    """How many weights the bits of the linears are counted over."""
    return sum(prod(e["shape"]) for e in folder.entries.values() if e["format"] != "dense")


def trained_share(folder: QuantizedFolder, widths: Mapping[str, int]) -> float:
    """Which share of the nested layers' weights was made for its width; others are interpolated."""
    weights = {True: 0, False: 0}
    for name, entry in nested_entries(folder).items():
        weights[widths[name] in entry["trained"]] += prod(entry["shape"])
    return weights[True] / sum(weights.values())
