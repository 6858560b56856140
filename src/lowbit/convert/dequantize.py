"""A quantized folder to a plain float one, which stock transformers loads."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.folder import write_folder
from lowbit.formats import build, link
from lowbit.formats.base import QuantizedLinear

logger = logging.getLogger(__name__)


def dequantize(folder: str | Path, out: str | Path, *, verify: bool = True) -> Path:
    """Writes the float weights that a quantized model multiplies by, and returns that folder.

    Other programs can read the result; what quantization lost stays lost. A float folder cannot
    state that activations are rounded when the model runs: where they are, a warning is logged.
    One shard is in memory at a time.

    folder: a quantized folder.
    out: the folder to write, which must not exist; weights have the dtype of the source model.
    verify: whether files are checked against their hashes first.

    Raises ValueError for a folder that is damaged, or an `out` that exists.
    """
    folder, out = Path(folder), Path(out)
    quantized = QuantizedFolder(folder)
    quantized.verify(hashes=verify)
    dtype = quantized.reader.tensors[quantized.marker].dtype  # of the weight that it stands for
    config = {k: v for k, v in quantized.config.items() if k != "quantization_config"}
    files = quantized.reader.files
    if quantized.attention or any(e.get("activation") for e in quantized.entries.values()):
        logger.warning(
            f"{folder} rounds activations when it runs; {out}, a float folder, has its weights but "
            "will not round activations, and so computes something else"
        )
    write_folder(out, _float_shards(quantized, dtype), len(files), config, folder)
    return out


def _float_shards(quantized: QuantizedFolder, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    placed = quantized.reader.tensors
    by_shard: dict[str, list[str]] = {file: [] for file in quantized.reader.files}
    packed: set[str] = {quantized.marker}
    for name in quantized.entries:
        tensors = quantized.tensors_of(name)
        packed.update(tensors)
        by_shard[placed[tensors[0]].file].append(name)
    for file, names in by_shard.items():
        plain = [key for key, info in placed.items() if info.file == file and key not in packed]
        shard = quantized.reader.read(plain)
        for name in names:
            shard |= _float_linear(quantized, name, dtype)
        yield shard


def _float_linear(quantized: QuantizedFolder, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    layer = _read(quantized, name)
    if layer.shares is not None:
        link({name: layer, layer.shares: _read(quantized, layer.shares)})
    made = {f"{name}.weight": layer.dequantize().to(dtype)}
    if layer.bias is not None:
        made[f"{name}.bias"] = layer.bias.detach()
    return made


def _read(quantized: QuantizedFolder, name: str) -> QuantizedLinear:
    layer = build(quantized.entries[name])
    stored = quantized.reader.read(quantized.tensors_of(name))
    layer.load_state_dict({key.removeprefix(f"{name}."): value for key, value in stored.items()})
    return layer
