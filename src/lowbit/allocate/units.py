"""Units: layers that must share a width, since engines fuse them or run them in one kernel."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowbit.blocks import LinearGroup
from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.slices import entries_with_widths, read_codes
from lowbit.formats.widths import entry_bytes, needs_codes, slice_entry
from lowbit.models import family_of
from lowbit.models.config import build_model, load_config
from lowbit.models.skeleton import memory_names
from lowbit.models.wiring import groups_of

EXPERT = re.compile(r"(.+?)\.\d+\.")  # the name of an expert's linear: mlp.experts.0.w1


@dataclass(frozen=True)
class Unit:
    """Layers that must have the same width.

    layers: names on disk.
    block: number of the block that they are in; None: they are in no block.
    patterns: names or patterns by which a plan refers to them.
    bytes: their size at each width, with scales and zeros.
    """

    layers: tuple[str, ...]
    block: int | None
    patterns: tuple[str, ...]
    bytes: Mapping[float, int]


@dataclass(frozen=True)
class Layout:
    """All units of a folder. blocks: number of blocks of the model."""

    units: tuple[Unit, ...]
    blocks: int


def layout_of(
    folder: QuantizedFolder, widths: tuple[int, ...], trust_remote_code: bool = False
) -> Layout:
    """Finds the units of a folder that holds 8-bit masters.

    Linears that read the same input form a unit (queries, keys and values; gate and up), and so do
    all experts of a block.

    folder: a folder made by matquant.
    widths: the widths whose sizes are computed.
    trust_remote_code: whether Python code that comes with the model may run.

    Raises ValueError for a folder without nested layers, and for one with layers that were cut to
    one width already.
    """
    entries = entries_with_widths(folder)
    if not entries:
        raise ValueError(
            f"{folder.folder} has no layers with several widths: name a folder made with a "
            "matquant recipe"
        )
    sizes = {name: _sizes(folder, name, widths) for name in entries}
    groups, blocks = _grouped(folder.folder, set(entries), trust_remote_code)
    grouped = {name for _, _, names in groups for name in names}
    groups += [(None, False, (name,)) for name in entries if name not in grouped]
    units = []
    for block, experts, names in groups:
        total: dict[float, int] = {w: sum(sizes[name][w] for name in names) for w in widths}
        units.append(Unit(names, block, patterns_of(names, experts), total))
    return Layout(tuple(units), blocks)


def _sizes(folder: QuantizedFolder, name: str, widths: tuple[int, ...]) -> dict[int, int]:
    """Returns the bytes of a layer at each width; extra precision makes them depend on codes."""
    entry = folder.entries[name]
    codes = read_codes(folder, name) if needs_codes(entry) else None
    try:
        return {width: entry_bytes(slice_entry(entry, width, codes)) for width in widths}
    except ValueError as error:
        raise ValueError(f"{folder.folder}: layer {name}: {error}") from None


def _grouped(
    folder: Path, wanted: set[str], trust_remote_code: bool
) -> tuple[list[tuple[int | None, bool, tuple[str, ...]]], int]:
    """Returns block, whether it has experts, and names of each unit; and the number of blocks."""
    config = load_config(folder, trust_remote_code)
    model = build_model(folder, config, trust_remote_code)
    family = family_of(model)
    in_memory = memory_names(model, [f"{name}.weight" for name in sorted(wanted)])
    on_disk = {m.removesuffix(".weight"): d.removesuffix(".weight") for d, m in in_memory.items()}
    groups: list[tuple[int | None, bool, tuple[str, ...]]] = []
    blocks = list(model.get_submodule(family.blocks).children())
    for number, block in enumerate(blocks):
        for experts, linears in fused(groups_of(family, config, block)):
            inside = (f"{family.blocks}.{number}.{linear}" for linear in linears)
            if names := tuple(on_disk[name] for name in inside if name in on_disk):
                groups.append((number, experts, names))
    return groups, len(blocks)


def fused(groups: Iterable[LinearGroup]) -> list[tuple[bool, tuple[str, ...]]]:
    """Returns the linears of a block that must share a width, each with whether they are experts.

    groups: the linears of the block, grouped by the input that they read.
    """
    together: dict[tuple[str, bool], list[str]] = {}
    for group in groups:
        for linear in group.linears:
            experts = EXPERT.match(linear)
            key = (experts[1], True) if experts else (group.name, False)
            together.setdefault(key, []).append(linear)
    return [(experts, tuple(names)) for (_, experts), names in together.items()]


def patterns_of(names: tuple[str, ...], experts: bool) -> tuple[str, ...]:
    """Returns the names by which a plan refers to linears, or one pattern for all experts."""
    return (os.path.commonprefix(names).rpartition(".")[0] + ".*",) if experts else names
