"""Slices of a folder that matquant made: which there are, and what they would take on disk."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint.output import Size, size_of
from lowbit.checkpoint.quantized_folder import QuantizedFolder
from lowbit.checkpoint.verify import read_config
from lowbit.formats.widths import (
    CODES,
    WidthPlan,
    choose_widths,
    entry_bytes,
    entry_widths,
    sliced_entries,
)


def entries_with_widths(folder: QuantizedFolder) -> dict[str, dict[str, Any]]:
    """The entries of all layers that have widths, by name on disk."""
    return {name: entry for name, entry in folder.entries.items() if entry_widths(entry)}


def has_masters(folder: Path) -> bool:
    """Whether a folder, of any kind, has layers that run at more widths than one."""
    section = read_config(folder).get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != "lowbit":
        return False
    return any(len(entry_widths(entry)) > 1 for entry in QuantizedFolder(folder).entries.values())


def widths_of(folder: QuantizedFolder, bits: WidthPlan) -> dict[str, int]:
    """The width of every layer that has some, by name on disk.

    bits: as `choose_widths` takes it. Raises ValueError, by the name of the layer, where the folder
    holds a slice of another width.
    """
    entries = entries_with_widths(folder)
    widths = choose_widths({name: entry["bits"] for name, entry in entries.items()}, bits)
    for name, entry in entries.items():
        if widths[name] not in entry_widths(entry):
            raise ValueError(
                f"layer {name}: it is a slice of {entry['bits']} bits: another, of {widths[name]} "
                "bits, can only be cut from the master"
            )
    return widths


def slices_of(folder: QuantizedFolder, bits: WidthPlan | None) -> dict[str, dict[str, Any]]:
    """Entries of the slices that take the place of the folder's masters, by name on disk."""
    if bits is None:
        return {}
    return sliced_entries(folder.entries, bits, lambda name: read_codes(folder, name))


def read_codes(folder: QuantizedFolder, name: str) -> Tensor:
    """The 8-bit codes of one layer, (out, in) uint8; name: on disk."""
    return folder.reader.read([f"{name}.{CODES}"])[f"{name}.{CODES}"]


def size_of_slice(folder: Path, bits: WidthPlan) -> Size:
    """What `size_of` would say of a folder with these slices in the place of the masters.

    With extra precision the masters are read: how many bytes a slice takes depends on their codes.
    """
    whole, quantized = size_of(folder), QuantizedFolder(folder)
    saved = sum(
        entry_bytes(quantized.entries[name]) - entry_bytes(entry)
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
    """The share of weights whose width is one that matquant trained for, from 0 to 1.

    The other widths lie between trained ones. widths: of all layers that have some, by name.
    """
    weights = {True: 0, False: 0}
    for name, entry in entries_with_widths(folder).items():
        weights[widths[name] in entry["trained"]] += prod(entry["shape"])
    return weights[True] / sum(weights.values())
