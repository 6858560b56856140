"""Converts the result of one block to the tensors and the record of its shard, and back.

The way back is needed when an interrupted run continues, and to check a dry run.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.layers import layers_from
from lowbit.formats import link
from lowbit.formats.activation import AttentionRounding
from lowbit.formats.dense import DenseLinear
from lowbit.formats.entry import Stack
from lowbit.methods.result import BlockResult
from lowbit.models.conv1d import TransposedLinear, as_on_disk
from lowbit.models.source import SourceModel
from lowbit.parsing import reason_of
from lowbit.ranks import Ranks
from lowbit.run_report import BlockReport, RunReport

# What records state of their shards, apart from the shards' own names, sizes and hashes.
STATED = ("block", "on_disk", "modules", "attention", "changed", "marker", "config", "report")


def as_stored(result: BlockResult, source: SourceModel, block: str) -> BlockResult:
    """Returns the result with every tensor in the dtype of the source model.

    So the streams continue with exactly the values that are saved.
    """

    def dtype_of(name: str) -> torch.dtype:
        return source.reader.tensors[source.disk_names[f"{block}.{name}"]].dtype

    for name, linear in result.linears.items():
        weight = dtype_of(f"{name}.weight")
        bias = None if linear.bias is None else dtype_of(f"{name}.bias")
        if isinstance(linear, DenseLinear):
            result.linears[name] = DenseLinear.from_weight(linear.values.to(weight), linear.bias)
        else:
            result.linears[name] = linear.with_dtypes(weight, bias)
        stored = result.linears[name]
        stored.spec = stored.spec.model_copy(update=_as_in_source(source, f"{block}.{name}"))
    link(result.linears)
    result.tensors = {name: t.detach().to(dtype_of(name)) for name, t in result.tensors.items()}
    return result


def _as_in_source(source: SourceModel, name: str) -> dict[str, Any]:
    """Returns fields of an entry: how the source stores the float weight of a linear."""
    if isinstance(source.skeleton.get_submodule(name), TransposedLinear):
        return {"transposed": True}
    views = getattr(source.reader, "views", {})
    view, bias = (views.get(source.disk_names.get(f"{name}.{end}")) for end in ("weight", "bias"))
    if view is None or view.place is None:
        return {}
    stack = Stack(tensor=view.sources[0], bias=bias and bias.sources[0], **asdict(view.place))
    return {"stack": stack}


def shard_of(
    result: BlockResult, source: SourceModel, block: str, first: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a block's shard by name on disk, and the record of the shard.

    first: whether this is the first shard with quantized layers. It also gets the placeholder: an
        empty tensor with the name of a float weight, which makes transformers refuse the folder
        where lowbit is not imported.
    """
    modules: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, linear in result.linears.items():
        disk = source.disk_name(f"{block}.{name}")
        modules[disk] = linear.entry()
        if linear.shares is not None:
            modules[disk]["shares"] = source.disk_name(f"{block}.{linear.shares}")
        tensors |= {f"{disk}.{key}": tensor for key, tensor in linear.state_dict().items()}
    module = source.skeleton.get_submodule(block)
    changed = {
        source.disk_names[f"{block}.{name}"]: as_on_disk(module, name, t)
        for name, t in result.tensors.items()
    }
    replaced = {f"{disk}.weight" for disk in modules} | {f"{disk}.bias" for disk in modules}
    kept = [n for n in source.block_tensors(block) if n not in replaced and n not in changed]
    tensors |= changed | source.reader.read(kept)
    placeholder = f"{next(iter(modules))}.weight" if first and modules else None
    if placeholder is not None:
        tensors[placeholder] = torch.empty(0, dtype=source.reader.tensors[placeholder].dtype)
    record = {
        "block": block,
        "on_disk": block_on_disk(source, block),
        "modules": modules,
        "attention": {
            source.disk_path(f"{block}.{name}"): rounding.settings()
            for name, rounding in result.attention.items()
        },
        "changed": list(changed),
        "marker": placeholder,
        "report": _report_on_disk(result.report, source, block).to_json(),
    }
    return tensors, record


def check_shard(
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    source: SourceModel,
    block: str,
    linears: Collection[str],
    first: bool | None,
) -> None:
    """Checks the shard and the record of an earlier run against what `shard_of` makes for a block.

    tensors: the tensors of the shard, by name on disk.
    linears: the names in memory of the linears that are to be quantized, relative to the block.
    first: as for `shard_of`; None: not known.

    Raises ValueError, as the rest of a sentence about the record, if `shard_of` did not make them.
    """
    try:
        result_of(tensors, {**record, "block": block}, source)
        reported = BlockReport.model_validate(record["report"]).linears.keys()
        layers = layers_from(record["modules"], tensors)
        states = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"does not fit its shard or the model ({reason_of(error)})") from error
    on_disk, modules, changed = block_on_disk(source, block), record["modules"], record["changed"]
    marked = bool(modules) and (record["marker"] is not None if first is None else first)
    placeholder = f"{next(iter(modules))}.weight" if marked else None
    stated: dict[str, Any] = {
        "block": block,
        "on_disk": on_disk,
        "marker": placeholder,
        "config": {},
    }
    for key, value in stated.items():
        if record.get(key, {}) != value:
            raise ValueError(f"states {key} {record[key]!r}, but it is {value!r}")
    wanted = {source.disk_name(f"{block}.{name}") for name in linears}
    if not wanted <= modules.keys() or not wanted <= {f"{on_disk}.{name}" for name in reported}:
        raise ValueError("does not state all linears that are to be quantized")
    replaced = {f"{name}.{key}" for name in modules for key in ("weight", "bias")}
    kept = set(source.block_tensors(block)) - replaced - set(changed)
    if tensors.keys() != kept | states | set(changed) | ({placeholder} - {None}):
        raise ValueError("states other tensors than its shard holds")
    for name, tensor in source.reader.read(kept).items():
        if not torch.equal(tensor, tensors[name]):
            raise ValueError(f"does not state that tensor {name} was changed")


def check_equal(ranks: Ranks, block: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if several processes have made other tensors of a block, by name."""
    if ranks.count == 1:
        return
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        content = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
        hashed.update(content.numpy().tobytes())
    if len(set(ranks.every(hashed.hexdigest()))) > 1:
        raise ValueError(
            f"{block}: the processes of this run have computed different values, so they cannot "
            "work on one model: use equal machines, with the same version of torch"
        )


def block_on_disk(source: SourceModel, block: str) -> str:
    """Returns the name of a block on disk: the common start of its tensors, up to its number."""
    shared = os.path.commonprefix([name.split(".") for name in source.block_tensors(block)])
    return ".".join(shared[: shared.index(block.rpartition(".")[2]) + 1])


def _report_on_disk(report: BlockReport, source: SourceModel, block: str) -> BlockReport:
    """Returns the report with the names that linears have on disk, relative to the block."""
    inside = f"{block_on_disk(source, block)}."
    return report.renamed(
        {name: source.disk_name(f"{block}.{name}").removeprefix(inside) for name in report.linears}
    )


def run_report(
    records: Sequence[Mapping[str, Any]],
    left_float: Sequence[str],
    dequantized: Mapping[str, int] | None = None,
) -> RunReport:
    """Returns the content of report.json, from the records of all shards."""
    blocks = {
        record["on_disk"]: BlockReport.model_validate(record["report"])
        for record in records
        if "on_disk" in record
    }
    return RunReport.of(blocks, left_float, dequantized)


def left_float(source: SourceModel, skipped: Sequence[str]) -> list[str]:
    """Returns the names on disk of all matrices in blocks that stay in float.

    skipped: names in memory of the linears that --skip and --only leave out.
    """
    names = source.disk_names
    return [
        names.get(name) or names[f"{name}.weight"].removesuffix(".weight")
        for name in (*source.left_float, *skipped)
    ]


def result_of(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any], source: SourceModel
) -> BlockResult:
    """Returns the result of a block from its shard: the inverse of `shard_of`, without the report.

    tensors: the tensors of the shard, by name on disk.
    record: the record of the shard.
    """
    block = record["block"]
    module = source.skeleton.get_submodule(block)
    memory = {disk: name for name, disk in source.disk_names.items()}
    result = BlockResult()
    for disk, linear in layers_from(record["modules"], tensors).items():
        name = memory[f"{disk}.weight"].removeprefix(f"{block}.").removesuffix(".weight")
        result.linears[name] = linear
    result.attention = {
        name: AttentionRounding.model_validate(record["attention"][disk])
        for name in source.attentions(block)
        if (disk := source.disk_path(f"{block}.{name}")) in record["attention"]
    }
    for disk in record["changed"]:
        name = memory[disk].removeprefix(f"{block}.")
        result.tensors[name] = as_on_disk(module, name, tensors[disk])
    return result


def packed_tensors(disk: str, names: Iterable[str]) -> list[str]:
    """Returns the names of the tensors of a packed weight, without bias and placeholder.

    disk: name of the linear on disk.
    names: names of tensors, of other linears too.
    """
    own = [name for name in names if name.startswith(f"{disk}.")]
    return [name for name in own if name not in (f"{disk}.bias", f"{disk}.weight")]
