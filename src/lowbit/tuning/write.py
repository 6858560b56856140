"""Writes the folder of a tuned model: the codes of the quantized one, and other vectors."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.derived import as_in_source, derived_config
from lowbit.checkpoint.folder import write_folder
from lowbit.formats.base import QuantizedLinear


def write_tuned(
    quantized: QuantizedFolder,
    out: Path,
    vectors: Mapping[str, Tensor],
    tuned: dict[str, Any] | None,
    code: bool,
) -> None:
    """Writes the folder at once; one shard is in memory at a time.

    quantized: the folder that was tuned.
    out: the folder to write, which must not exist.
    vectors: tuned vectors by name on disk, in their stored dtypes.
    tuned: what made_by says of the tuning; None: nothing was tuned, and the folder is a copy.
    code: whether Python code is copied.
    """
    entries = dict(quantized.entries)

    def stored(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
        whole = layer.with_vectors() if tuned is not None else layer
        if whole is not layer:
            entries[name] = as_in_source(whole.entry(), entries[name])
        return dict(whole.state_dict()) | quantized.placeholder_in(name)

    def shards() -> Iterator[dict[str, Tensor]]:
        for tensors in quantized.converted_shards(stored):
            yield {name: vectors.get(name, tensor) for name, tensor in tensors.items()}

    more = {} if tuned is None else {"tuned": tuned}
    count = len(quantized.reader.files)
    config = lambda folder: derived_config(quantized, folder, entries, more)  # noqa: E731
    write_folder(out, shards(), count, config, quantized.folder, code)
