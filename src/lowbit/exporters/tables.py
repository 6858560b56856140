"""Shows packed tables of embeddings as float tensors, for targets that read no others."""

from collections.abc import Sequence
from copy import copy
from functools import partial

from torch import Tensor

from lowbit.checkpoint.layers import layers_from
from lowbit.checkpoint.quantized_folder import QuantizedFolder
from lowbit.checkpoint.views import View, ViewingReader
from lowbit.formats.embedding import tables_of


def with_float_tables(folder: QuantizedFolder) -> QuantizedFolder:
    """Returns the folder as if its tables had stayed in float; the folder itself without tables."""
    tables = tables_of(folder.entries)
    if not tables:
        return folder
    made = copy(folder)
    made.entries = {name: e for name, e in folder.entries.items() if name not in tables}
    made.reader = ViewingReader(folder.reader, {f"{n}.weight": _view(folder, n) for n in tables})
    return made


def _view(folder: QuantizedFolder, name: str) -> View:
    names = tuple(folder.tensors_of(name))
    shape, dtype = tuple(folder.entries[name]["shape"]), folder.float_dtype(name)
    return View(names, partial(_dequantized, folder, name, names), shape, dtype=dtype)


def _dequantized(
    folder: QuantizedFolder, name: str, names: Sequence[str], stored: list[Tensor]
) -> Tensor:
    tensors = dict(zip(names, stored, strict=True))
    table = layers_from({name: folder.entries[name]}, tensors)[name]
    return table.dequantize().to(folder.float_dtype(name))
