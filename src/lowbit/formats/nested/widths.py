"""Which width each nested layer runs at: one for all, or a plan of patterns."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from lowbit.formats.nested import NestedLinear, sliced_entry
from lowbit.patterns import matches

WidthPlan = int | Mapping[str, int] | str | Path


def nested_layers(model: nn.Module) -> dict[str, NestedLinear]:
    """The nested layers of a model by their names on disk, which differ for some experts."""
    modules = model.named_modules()
    return {m.stored_as or name: m for name, m in modules if isinstance(m, NestedLinear)}


def set_bits(model: nn.Module, bits: WidthPlan) -> None:
    """Runs a model's nested layers at other widths from now on; the master must be resident.

    bits: as `choose_widths` takes it, with names on disk. Raises ValueError, by the name of the
    layer, and before anything has changed.
    """
    layers = nested_layers(model)
    current = {name: layer.bits for name, layer in layers.items()}
    widths = choose_widths(current, bits)
    for name, layer in layers.items():
        try:
            layer.at(widths[name])
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    for name, layer in layers.items():
        layer.set_bits(widths[name])


def sliced_entries(
    entries: Mapping[str, dict[str, Any]], bits: WidthPlan, read_master: Callable[[str], Tensor]
) -> dict[str, dict[str, Any]]:
    """The entries of the slices that take the place of a folder's masters, by name.

    entries: of all layers of the folder; those of other formats are left out. bits: as
    `choose_widths` takes it; a layer without a width of its own keeps that of its entry.
    read_master: the codes of a layer; asked for where there is extra precision. Raises ValueError,
    by the name of the layer, for a slice of another width.
    """
    nested = {name: e for name, e in entries.items() if e["format"] == NestedLinear.format}
    widths = choose_widths({name: entry["bits"] for name, entry in nested.items()}, bits)
    sliced = {}
    for name, entry in nested.items():
        if entry["resident"] == "slice" and entry["bits"] == widths[name]:
            continue
        master = read_master(name) if entry["extra_precision"] else None
        try:
            sliced[name] = sliced_entry(entry, widths[name], master)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    return sliced


def choose_widths(current: Mapping[str, int], bits: WidthPlan) -> dict[str, int]:
    """The width of every layer, by its name.

    current: the widths of all nested layers, which stay where a plan says nothing. bits: one for
    all; or {name or pattern: width}, where the last match wins and "mlp.*" also means the last
    parts of a name; or the path of a YAML file of that. Raises ValueError for a width that is none,
    and for a pattern that means no layer.
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
