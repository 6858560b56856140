"""Layers that can run at several widths: which one each of them takes, and what a slice holds.

matquant makes them, in the format `nested`; no other format has widths. Whoever runs, cuts or
counts slices asks this module and `QuantizedLinear.widths`, and need not know which format it is.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.nested import (
    NestedEntry,
    NestedLinear,
    slice_tensors,
    sliced_entry,
    tensor_bytes,
    to_uniform,
)
from lowbit.patterns import matches

# One width for all layers, {name or pattern: width}, or the path of a YAML file of that.
WidthPlan = int | Mapping[str, int] | str | Path

CODES = "master"  # the tensor that a slice is cut from
SLICE_TENSORS = ("packed", "overflow")  # those that take its place


def layers_with_widths(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of a model that have widths, by their names on disk.

    A layer that comes from no folder has its name in memory, which differs for some experts.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return {layer.stored_as or name: layer for name, layer in layers.items() if layer.widths}


def set_bits(model: nn.Module, bits: WidthPlan) -> None:
    """Runs the layers of a model that have widths at other ones from now on.

    bits: one width for all layers, {name on disk or pattern: width}, or the path of a YAML file of
        that; see `choose_widths`.

    Raises ValueError, by the name of the layer, for one that holds a slice of another width; then
    no layer has changed.
    """
    layers = layers_with_widths(model)
    widths = choose_widths({n: layer.bits for n, layer in layers.items() if layer.bits}, bits)
    for name, layer in layers.items():
        try:
            layer.at(widths[name])
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    for name, layer in layers.items():
        layer.set_bits(widths[name])


def entry_widths(entry: dict[str, Any]) -> tuple[int, ...]:
    """The widths of the layer that an entry describes, as `QuantizedLinear.widths` has them."""
    if entry["format"] != NestedLinear.format:
        return ()
    return NestedEntry.model_validate(entry).widths


def entry_bytes(entry: dict[str, Any]) -> int:
    """Bytes that stand for the weight of a layer with widths: `QuantizedLinear.weight_bytes`."""
    return tensor_bytes(**entry)


def needs_codes(entry: dict[str, Any]) -> bool:
    """Whether the size of a slice of this layer depends on its codes: with extra precision."""
    return bool(entry["extra_precision"])


def slice_entry(entry: dict[str, Any], bits: int, codes: Tensor | None = None) -> dict[str, Any]:
    """The entry of a slice of a layer with widths.

    bits: the width of the slice.
    codes: the layer's tensor CODES, (out, in) uint8; only used where `needs_codes`.

    Raises ValueError for a layer that is itself a slice.
    """
    return sliced_entry(entry, bits, codes)


def cut_tensors(layer: QuantizedLinear, codes: Tensor) -> dict[str, Tensor]:
    """What takes the place of a layer's codes, in an empty layer that holds a slice of them.

    codes: the tensor CODES, (out, in) uint8  ->  the tensors named in SLICE_TENSORS
    """
    assert isinstance(layer, NestedLinear)
    return slice_tensors(layer.spec, codes)


def slice_layer(layer: QuantizedLinear, bits: int, keep_format: bool) -> QuantizedLinear:
    """A layer that holds one width of a layer alone, in its own bits.

    keep_format: a slice in the layer's own format. Else a layer of the uniform format, whose weight
        is the same to the last bit; ValueError where that format cannot hold it.
    """
    assert isinstance(layer, NestedLinear)
    if not keep_format:
        return to_uniform(layer, bits)
    return layer if layer.widths == (bits,) else layer.slice(bits)


def sliced_entries(
    entries: Mapping[str, dict[str, Any]], bits: WidthPlan, read_codes: Callable[[str], Tensor]
) -> dict[str, dict[str, Any]]:
    """The entries of the slices that take the place of a folder's layers, by name on disk.

    entries: of all layers of the folder; those without widths are left out.
    bits: as `choose_widths` takes it; what it does not name keeps the width of its entry.
    read_codes: gives the tensor CODES of a layer; called where `needs_codes`.

    Raises ValueError, by the name of the layer, for one that is a slice of another width.
    """
    found = {name: entry for name, entry in entries.items() if entry_widths(entry)}
    widths = choose_widths({name: entry["bits"] for name, entry in found.items()}, bits)
    sliced = {}
    for name, entry in found.items():
        if entry_widths(entry) == (widths[name],):
            continue
        codes = read_codes(name) if needs_codes(entry) else None
        try:
            sliced[name] = slice_entry(entry, widths[name], codes)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    return sliced


def choose_widths(current: Mapping[str, int], bits: WidthPlan) -> dict[str, int]:
    """The width of every layer, by its name.

    current: the widths of all layers that have some; they stay where a plan says nothing.
    bits: one width for all; or {name or pattern: width}, where the last match wins and a pattern
        such as "mlp.*" may also match the last parts of a name; or the path of a YAML file of that.

    Raises ValueError for a width that is none, and for a pattern that matches no layer.
    """
    if not current:
        raise ValueError("no layer here is nested: only what matquant has quantized has widths")
    if not isinstance(bits, int | str | Path | Mapping):
        raise ValueError(
            f"bits is {bits!r}: allowed are 2 to 8, {{name or pattern: width}}, or the path of a "
            "YAML file of that"
        )
    plan: Any = {"*": bits} if isinstance(bits, int) else bits
    plan = plan if isinstance(plan, Mapping) else _read(Path(plan))
    if not all(isinstance(pattern, str) for pattern in plan):
        raise ValueError(f"bits is {dict(plan)!r:.80}: it must map patterns of layers to widths")
    chosen = dict(current)
    for pattern, width in plan.items():
        if type(width) is not int or width not in range(2, 9):
            raise ValueError(f"bits for {pattern!r} is {width!r}: allowed are 2 to 8")
        named = [name for name in current if matches(name, pattern)]
        if not named:
            raise ValueError(f"{pattern!r} means no nested layer; there are {_shown(current)}")
        chosen |= dict.fromkeys(named, width)
    return chosen


def _shown(names: Iterable[str], most: int = 7) -> str:
    shown = sorted(names)
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def _read(path: Path) -> dict[str, Any]:
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"plan {path} cannot be read: {reason}") from None
    if not isinstance(plan, dict) or not all(isinstance(pattern, str) for pattern in plan):
        raise ValueError(f"plan {path} must map patterns of layers to widths")
    return plan
