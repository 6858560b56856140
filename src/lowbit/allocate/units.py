"""The layers that must share a width: what engines fuse into one matrix, or run in one kernel."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.slices import entries_with_widths, read_codes
from lowbit.formats.widths import entry_bytes, needs_codes, slice_entry
from lowbit.models import family_of
from lowbit.models.skeleton import build_skeleton, memory_names
from lowbit.models.streamed import load_config
from lowbit.models.wiring import groups_of

NUMBERED = re.compile(r"(.+?)\.\d+\.")  # an expert: mlp.experts.0.w1


@dataclass(frozen=True)
class Unit:
    """Layers of one width. layers: names on disk. block: which one they are in; None: in none.

    patterns: what a plan calls them. bytes: what they take at each width, scales and zeros too.
    """

    layers: tuple[str, ...]
    block: int | None
    patterns: tuple[str, ...]
    bytes: dict[int, int]


@dataclass(frozen=True)
class Layout:
    """All layers of a folder that have widths. blocks: how many the model has."""

    units: tuple[Unit, ...]
    blocks: int


def layout_of(
    folder: QuantizedFolder, widths: tuple[int, ...], trust_remote_code: bool = False
) -> Layout:
    """The units of a folder that holds masters: linears that read the same input (queries, keys
    and values; gate and up), and all experts of a block together.

    Raises ValueError for a folder without nested layers, and by name for one that is a slice.
    """
    entries = entries_with_widths(folder)
    if not entries:
        raise ValueError(f"{folder.folder}: no layer is nested: only matquant makes such layers")
    sizes = {name: _sizes(folder, name, widths) for name in entries}
    found, blocks = _grouped(folder.folder, set(entries), trust_remote_code)
    grouped = {name for _, _, names in found for name in names}
    found += [(None, False, (name,)) for name in entries if name not in grouped]
    units = []
    for block, experts, names in found:
        patterns = (os.path.commonprefix(names).rpartition(".")[0] + ".*",) if experts else names
        total = {width: sum(sizes[name][width] for name in names) for width in widths}
        units.append(Unit(names, block, patterns, total))
    return Layout(tuple(units), blocks)


def _sizes(folder: QuantizedFolder, name: str, widths: tuple[int, ...]) -> dict[int, int]:
    """Bytes of a layer's slices; those with extra precision depend on the codes."""
    entry = folder.entries[name]
    codes = read_codes(folder, name) if needs_codes(entry) else None
    try:
        return {width: entry_bytes(slice_entry(entry, width, codes)) for width in widths}
    except ValueError as error:
        raise ValueError(f"{folder.folder}: layer {name}: {error}") from None


def _grouped(
    folder: Path, wanted: set[str], trust_remote_code: bool
) -> tuple[list[tuple[int | None, bool, tuple[str, ...]]], int]:
    """(block, whether they are experts, names on disk) of every unit, and the number of blocks."""
    config = load_config(folder, trust_remote_code)
    model = build_skeleton(config, trust_remote_code)
    family = family_of(config, model)
    inside = memory_names(model, [f"{name}.weight" for name in sorted(wanted)])
    on_disk = {m.removesuffix(".weight"): d.removesuffix(".weight") for d, m in inside.items()}
    found: list[tuple[int | None, bool, tuple[str, ...]]] = []
    blocks = list(model.get_submodule(family.blocks).children())
    for number, block in enumerate(blocks):
        together: dict[tuple[str, bool], list[str]] = {}
        for group in groups_of(family, config, block):
            for linear in group.linears:
                experts = NUMBERED.match(linear)
                key = (experts[1], True) if experts else (group.name, False)
                name = f"{family.blocks}.{number}.{linear}"
                if name in on_disk:
                    together.setdefault(key, []).append(on_disk[name])
        found += [(number, experts, tuple(names)) for (_, experts), names in together.items()]
    return found, len(blocks)
