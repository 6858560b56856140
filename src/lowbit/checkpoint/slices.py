"""Slices of a MatQuant folder: which widths its layers have, and the size of a slice on disk.

A MatQuant layer is a layer in format `nested`. A master is such a layer with 8-bit codes; a slice
of it keeps the upper bits of these codes.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint.output import Size, size_of
from lowbit.checkpoint.quantized_folder import QuantizedFolder
from lowbit.checkpoint.recognize import runnable_folder
from lowbit.formats.widths import (
    CODES,
    WidthPlan,
    choose_widths,
    entry_bytes,
    entry_widths,
    sliced_entries,
)


def entries_with_widths(folder: QuantizedFolder) -> dict[str, dict[str, Any]]:
    """Returns the entries of all MatQuant layers, by name on disk."""
    return {name: entry for name, entry in folder.entries.items() if entry_widths(entry)}


def has_masters(folder: Path) -> bool:
    """Returns whether a model folder, float or quantized, has layers with more than one width."""
    if runnable_folder(folder).program is None:
        return False
    return any(len(entry_widths(entry)) > 1 for entry in QuantizedFolder(folder).entries.values())


def widths_of(folder: QuantizedFolder, bits: WidthPlan) -> dict[str, int]:
    """Returns the chosen width of every MatQuant layer, by name on disk.

    bits: one width for all layers, widths by name or pattern, or the path of a YAML file of that;
        see `choose_widths`.

    Raises ValueError, with the name of the layer, if the folder holds only a slice of another
    width.
    """
    entries = entries_with_widths(folder)
    widths = choose_widths({name: entry["bits"] for name, entry in entries.items()}, bits)
    for name, entry in entries.items():
        if widths[name] not in entry_widths(entry):
            raise ValueError(
                f"layer {name} is a slice of {entry['bits']} bits, from which one of "
                f"{widths[name]} bits cannot be cut: use the MatQuant folder with the 8-bit codes"
            )
    return widths


def slices_of(folder: QuantizedFolder, bits: WidthPlan | None) -> dict[str, dict[str, Any]]:
    """Returns the entries of the slices that replace the folder's masters, by name on disk.

    bits: as `widths_of` takes it; None: no slices.
    """
    if bits is None:
        return {}
    return sliced_entries(folder.entries, bits, lambda name: read_codes(folder, name))


def read_codes(folder: QuantizedFolder, name: str) -> Tensor:
    """Returns the 8-bit codes of one layer: (out, in) uint8. name: on disk"""
    return folder.reader.read([f"{name}.{CODES}"])[f"{name}.{CODES}"]


def size_of_slice(folder: Path, bits: WidthPlan) -> Size:
    """Returns the size that a folder would have with slices of these widths instead of masters.

    bits: as `widths_of` takes it.

    For layers with extra precision the codes of the masters are read, because the size of a slice
    depends on them.
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
    """Returns the number of quantized weights, over which `Size.linears` is the mean."""
    return sum(prod(e["shape"]) for e in folder.entries.values() if e["format"] != "dense")


def trained_share(folder: QuantizedFolder, widths: Mapping[str, int]) -> float:
    """Returns the share of weights, from 0 to 1, that run at a width MatQuant optimized.

    The rest run at widths that it did not optimize, such as 3 if it optimized 2 and 4.

    widths: the chosen width of every MatQuant layer, by name on disk.
    """
    weights = {True: 0, False: 0}  # by whether their width was trained
    for name, entry in entries_with_widths(folder).items():
        weights[widths[name] in entry["trained"]] += prod(entry["shape"])
    return weights[True] / sum(weights.values())
