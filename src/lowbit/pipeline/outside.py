"""Quantizes what is outside the blocks on request: output layer and tables of embeddings.

Both are rounded to nearest, without calibration: the output layer with one scale per row, a table
with one for each group of a row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.formats.embedding import QuantizedEmbedding
from lowbit.methods.packing import pack
from lowbit.models.source import SourceModel
from lowbit.pipeline.options import RunOptions
from lowbit.solvers.rounding import minmax_grid

# Channels that share a scale, by the bits of a table. All are multiples of 32, llama.cpp's blocks.
GROUPS = {8: 128, 6: 64, 4: 32}
ROWS = 8192  # rows of a table that are rounded at once
PER_LAYER = "embed_tokens_per_layer"  # Gemma 3n's second table, of a vector for each block


# What the record of a shard says to change in config.json.
UNTIED = {"config": {"tie_word_embeddings": False}}


def outside_blocks(
    source: SourceModel, options: RunOptions
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns all tensors outside the blocks, by name on disk, and the record of their shard.

    An output layer that is tied to the embedding is untied if it gets bits of its own, or if the
    folder has a table of other values for it: transformers uses both tables, but programs that go
    by config.json would leave one out.

    Raises ValueError for a model whose output layer is not an nn.Linear, or whose embedding is not
    an nn.Embedding, if that is to be quantized.
    """
    tensors = source.reader.read(source.outside_tensors())
    record: dict[str, Any] = UNTIED.copy() if _has_two_tables(source, tensors) else {}
    if options.lm_head_bits is not None:
        record = _pack_head(source, tensors, options.lm_head_bits)
    if options.embedding_bits is not None:
        modules = _pack_tables(source, tensors, options.embedding_bits)
        entries = {name: table.entry() for name, table in modules.items()}
        record["modules"] = record.get("modules", {}) | entries
    return tensors, record


def rounded_tables(source: SourceModel, options: RunOptions) -> dict[str, Tensor]:
    """Returns the rounded tables of embeddings in float32, by the name of the weight in memory."""
    if options.embedding_bits is None:
        return {}
    tensors = source.reader.read(source.outside_tensors())
    found = _tables(source, tensors, options.embedding_bits)
    return {f"{name}.weight": table.dequantize() for name, _, table in found}


def _has_two_tables(source: SourceModel, tensors: dict[str, Tensor]) -> bool:
    """Returns whether config.json ties the output layer to a table that has other values."""
    head = source.skeleton.get_output_embeddings()
    for target, first in source.skeleton.all_tied_weights_keys.items():
        pair = [tensors.get(source.disk_names.get(name, name)) for name in (target, first)]
        own = source.skeleton.get_submodule(target.rpartition(".")[0]) is head
        if own and pair[0] is not None and pair[1] is not None:
            return not torch.equal(pair[0], pair[1])
    return False


def _pack_head(source: SourceModel, tensors: dict[str, Tensor], bits: int) -> dict[str, Any]:
    """Packs the output layer in place; returns the record.

    tensors: the tensors outside the blocks, by name on disk.
    """
    name = _head_of(source)
    tied = source.skeleton.all_tied_weights_keys.get(f"{name}.weight")
    stored = source.disk_names.get(f"{name}.weight")
    if stored is not None:
        disk, weight = stored.removesuffix(".weight"), tensors.pop(stored)
        if tied is not None:
            tensors.setdefault(source.disk_names.get(tied, tied), weight)
    else:
        assert tied is not None  # SourceModel has checked that no tensor is missing
        disk, weight = name, tensors[source.disk_names[tied]]
    bias = tensors.pop(f"{disk}.bias", None)
    floats = weight.float()
    packed = pack(floats, bias, minmax_grid(floats, bits, None, False))
    packed = packed.with_dtypes(weight.dtype, None if bias is None else bias.dtype)
    tensors |= {f"{disk}.{key}": tensor for key, tensor in packed.state_dict().items()}
    placeholder = f"{disk}.weight"
    tensors[placeholder] = torch.empty(0, dtype=weight.dtype)
    record = {"modules": {disk: packed.entry()}, "marker": placeholder}
    return record | UNTIED


def _pack_tables(
    source: SourceModel, tensors: dict[str, Tensor], bits: int
) -> dict[str, QuantizedEmbedding]:
    """Packs the tables of embeddings in place; returns them by name on disk."""
    made = {}
    for name, stored, table in list(_tables(source, tensors, bits)):
        disk = source.disk_names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        for other in stored:  # a tied table is stored once
            del tensors[other]
        tensors |= {f"{disk}.{key}": tensor for key, tensor in table.state_dict().items()}
        made[disk] = table
    return made


def _tables(
    source: SourceModel, tensors: dict[str, Tensor], bits: int
) -> Iterator[tuple[str, list[str], QuantizedEmbedding]]:
    """Yields the name in memory of each table, the names on disk of its weight, and its rounding.

    tensors: the tensors outside the blocks, by name on disk.
    """
    tied = source.skeleton.all_tied_weights_keys
    for name in table_names(source):
        weight = f"{name}.weight"
        first = tied.get(weight, weight)
        same = [weight, first, *(t for t, s in tied.items() if s == first)]
        disk = dict.fromkeys(source.disk_names.get(n, n) for n in same)
        stored = [other for other in disk if other in tensors and tensors[other].numel()]
        if not stored:
            raise ValueError(f"{name} has no table of its own: leave embedding_bits out")
        if not all(torch.equal(tensors[stored[0]], tensors[other]) for other in stored[1:]):
            raise ValueError(
                f"{source.folder}/config.json says that {' and '.join(stored)} are one table, but "
                "the folder has both, with different values, and embedding_bits would store one: "
                "set tie_word_embeddings to false there"
            )
        yield name, stored, _rounded(tensors[stored[0]], bits)


def table_names(source: SourceModel) -> list[str]:
    """Returns the names in memory of the tables of tokens that can be packed.

    Tables of positions are not among them. Raises ValueError if there are none.
    """
    skeleton = source.skeleton
    main = skeleton.get_input_embeddings()
    if not isinstance(main, nn.Embedding):
        raise ValueError(
            f"{type(skeleton).__name__} has no table of embeddings that lowbit can pack: leave "
            "embedding_bits out"
        )
    return [
        name
        for name, module in skeleton.named_modules()
        if module is main or (isinstance(module, nn.Embedding) and name.endswith(PER_LAYER))
    ]


def _rounded(weight: Tensor, bits: int) -> QuantizedEmbedding:
    size = GROUPS[bits]
    scales = [minmax_grid(part.float(), bits, size, True).scale for part in weight.split(ROWS)]
    return QuantizedEmbedding.nearest(weight, torch.cat(scales), bits, size, weight.dtype)


def _head_of(source: SourceModel) -> str:
    head = source.skeleton.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(source.skeleton).__name__} has no linear output layer: leave lm_head_bits out"
        )
    return next(name for name, module in source.skeleton.named_modules() if module is head)
