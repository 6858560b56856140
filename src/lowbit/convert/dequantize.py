"""A quantized folder to a plain float one, which stock transformers loads."""

import logging
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.folder import write_folder
from lowbit.formats.base import QuantizedLinear

logger = logging.getLogger(__name__)


def dequantize(
    folder: str | Path, out: str | Path, *, verify: bool = True, trust_remote_code: bool = False
) -> Path:
    """Writes the float weights that a quantized model multiplies by, and returns that folder.

    Other programs can read the result; what quantization lost stays lost. A float folder cannot
    state that activations are rounded when the model runs: where they are, a warning is logged.
    One shard is in memory at a time.

    folder: a quantized folder.
    out: the folder to write, which must not exist; weights have the dtype of the source model.
    verify: whether files are checked against their hashes first.
    trust_remote_code: whether Python code that comes with the model is copied.

    Raises ValueError for a folder that is damaged, or an `out` that exists.
    """
    folder, out = Path(folder), Path(out)
    quantized = QuantizedFolder(folder)
    quantized.verify(hashes=verify)
    config = {k: v for k, v in quantized.config.items() if k != "quantization_config"}
    if quantized.attention or any(e.get("activation") for e in quantized.entries.values()):
        logger.warning(
            f"{folder} rounds activations when it runs; {out}, a float folder, has its weights but "
            "will not round activations, and so computes something else"
        )

    def weights(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
        weight = {"weight": layer.dequantize().to(quantized.float_dtype(name))}
        return weight if layer.bias is None else weight | {"bias": layer.bias.detach()}

    shards, count = quantized.converted_shards(weights), len(quantized.reader.files)
    write_folder(out, shards, count, config, folder, trust_remote_code)
    return out
