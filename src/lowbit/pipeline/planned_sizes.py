"""Computes the sizes that `plan` states: of the packed linears, and of the whole model."""

import math
from collections import defaultdict
from typing import Any

from lowbit.formats.embedding import tables_of
from lowbit.pipeline.dry_run import DryRun, DryRunBlock, LinearKind, weights_in
from lowbit.pipeline.job import Job
from lowbit.pipeline.results import packed_tensors


def planned_sizes(
    job: Job, measured: DryRun, similar: list[tuple[DryRunBlock, float]]
) -> dict[str, Any]:
    """The fields linears, model, bytes and learned of the Estimate.

    similar: for every block, the measured block most like it and the ratio of their sizes.
    """
    reader, outside = job.source.reader, measured.outside_tensors
    entries = measured.outside_record.get("modules", {})
    tables = tables_of(entries)
    head_entries = {disk: entry for disk, entry in entries.items() if disk not in tables}
    stored = _stored_by_kind(measured)
    head = {name for disk in head_entries for name in packed_tensors(disk, outside)}
    packed = float(sum(outside[name].bytes for name in head))
    weights = sum(math.prod(entry["shape"]) for entry in head_entries.values())
    table_parts = {name for disk in tables for name in packed_tensors(disk, outside)}
    table_bytes = sum(outside[name].bytes for name in table_parts)
    rest = [info for name, info in outside.items() if name not in head | table_parts]
    headers = measured.outside_record["size"] - sum(info.bytes for info in outside.values())
    learned = 0.0
    for name, kinds, (block, ratio) in zip(job.blocks, measured.kinds, similar, strict=True):
        each = [stored[kind] for kind in kinds.values()]
        packed += sum(size for size, _ in each)
        weights += weights_in(kinds)
        replaced = {f"{disk}.weight" for disk in kinds}
        kept = [reader.tensors[n] for n in job.source.block_tensors(name) if n not in replaced]
        rest += kept
        count = len(kept) + sum(count for _, count in each)
        tensors = block.record["tensors"]
        headers += count * (block.record["size"] - sum(tensors.values())) / len(tensors)
        learned += ratio * block.learned
    whole = packed + table_bytes + sum(info.bytes for info in rest)
    outside_linears = sum(math.prod(entries[disk]["shape"]) for disk in tables)
    outside_linears += sum(math.prod(info.shape) for info in rest)
    return {
        "linears": 8 * packed / weights,
        "model": 8 * whole / (weights + outside_linears),
        "bytes": round(whole + headers),
        "learned": round(learned),
    }


def _stored_by_kind(measured: DryRun) -> dict[LinearKind, tuple[float, float]]:
    """For each kind of linear the mean bytes and the mean number of its tensors, without bias."""
    sizes: dict[LinearKind, list[list[int]]] = defaultdict(list)
    for index, block in measured.blocks.items():
        tensors = block.record["tensors"]
        for disk, kind in measured.kinds[index].items():
            sizes[kind].append([tensors[name] for name in packed_tensors(disk, tensors)])
    return {
        kind: (sum(map(sum, each)) / len(each), sum(map(len, each)) / len(each))
        for kind, each in sizes.items()
    }
