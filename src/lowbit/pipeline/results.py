"""A block's result to the tensors and the record of one shard, and back after an interruption."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.layers import layers_from
from lowbit.formats import link
from lowbit.formats.activation import Activation
from lowbit.formats.dense import DenseLinear
from lowbit.methods.result import BlockResult
from lowbit.models.source import SourceModel
from lowbit.run_report import BlockReport, RunReport


def as_stored(result: BlockResult, source: SourceModel, block: str) -> BlockResult:
    """The result with everything in the dtypes of the source: what is saved is what runs on."""

    def dtype_of(name: str) -> torch.dtype:
        return source.reader.tensors[source.disk_names[f"{block}.{name}"]].dtype

    for name, linear in result.linears.items():
        weight = dtype_of(f"{name}.weight")
        bias = None if linear.bias is None else dtype_of(f"{name}.bias")
        if isinstance(linear, DenseLinear):
            result.linears[name] = DenseLinear.from_weight(linear.values.to(weight), linear.bias)
        else:
            result.linears[name] = linear.with_dtypes(weight, bias)
    link(result.linears)
    result.tensors = {name: t.detach().to(dtype_of(name)) for name, t in result.tensors.items()}
    return result


def shard_of(
    result: BlockResult, source: SourceModel, block: str, first: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name on disk, and the record that goes with them.

    first: this shard also holds the marker, the empty tensor that is named like a float weight and
    makes transformers refuse the folder where lowbit is not imported.
    """
    modules: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, linear in result.linears.items():
        disk = source.disk_name(f"{block}.{name}")
        modules[disk] = linear.entry()
        if linear.shares is not None:
            modules[disk]["shares"] = source.disk_name(f"{block}.{linear.shares}")
        tensors |= {f"{disk}.{key}": tensor for key, tensor in linear.state_dict().items()}
    changed = {source.disk_names[f"{block}.{name}"]: t for name, t in result.tensors.items()}
    replaced = {f"{disk}.weight" for disk in modules} | {f"{disk}.bias" for disk in modules}
    kept = [n for n in source.block_tensors(block) if n not in replaced and n not in changed]
    tensors |= changed | source.reader.read(kept)
    marker = f"{next(iter(modules))}.weight" if first and modules else None
    if marker is not None:
        tensors[marker] = torch.empty(0, dtype=source.reader.tensors[marker].dtype)
    record = {
        "block": block,
        "on_disk": block_on_disk(source, block),
        "modules": modules,
        "attention": {
            source.disk_path(f"{block}.{name}"): rounding.model_dump()
            for name, rounding in result.attention.items()
        },
        "changed": list(changed),
        "marker": marker,
        "report": _report_on_disk(result.report, source, block).to_json(),
    }
    return tensors, record


def block_on_disk(source: SourceModel, block: str) -> str:
    """What a block is called on disk: what all its tensors begin with, up to its number."""
    shared = os.path.commonprefix([name.split(".") for name in source.block_tensors(block)])
    return ".".join(shared[: shared.index(block.rpartition(".")[2]) + 1])


def _report_on_disk(report: BlockReport, source: SourceModel, block: str) -> BlockReport:
    """The report with linears named as on disk, relative to the block."""
    inside = f"{block_on_disk(source, block)}."
    return report.renamed(
        {name: source.disk_name(f"{block}.{name}").removeprefix(inside) for name in report.linears}
    )


def run_report(records: Sequence[Mapping[str, Any]], left_float: Sequence[str]) -> RunReport:
    """report.json, from the records of all shards."""
    blocks = {
        record["on_disk"]: BlockReport.model_validate(record["report"])
        for record in records
        if "on_disk" in record
    }
    return RunReport.of(blocks, left_float)


def left_float(source: SourceModel, skipped: Sequence[str]) -> list[str]:
    """The matrices that no method gets, as they are called on disk."""
    names = source.disk_names
    return [
        names.get(name) or names[f"{name}.weight"].removesuffix(".weight")
        for name in (*source.left_float, *skipped)
    ]


def result_of(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any], source: SourceModel
) -> BlockResult:
    """The inverse of `shard_of`, as far as the streams need it."""
    block = record["block"]
    memory = {disk: name for name, disk in source.disk_names.items()}
    result = BlockResult()
    for disk, linear in layers_from(record["modules"], tensors).items():
        name = memory[f"{disk}.weight"].removeprefix(f"{block}.").removesuffix(".weight")
        result.linears[name] = linear
    result.attention = {
        name: Activation.model_validate(record["attention"][disk])
        for name in source.attentions(block)
        if (disk := source.disk_path(f"{block}.{name}")) in record["attention"]
    }
    for disk in record["changed"]:
        result.tensors[memory[disk].removeprefix(f"{block}.")] = tensors[disk]
    return result
