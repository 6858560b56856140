"""A quantized folder to a plain float one, which stock transformers loads."""

import logging
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.folder import write_folder
from lowbit.formats.base import QuantizedLinear

logger = logging.getLogger(__name__)


def dequantize(
    folder: Path, out: Path, verify: bool = True, trust_remote_code: bool = False
) -> Path:
    """Writes every quantized linear as the weight that it multiplies by, in the source's dtype.

    verify: check the hashes of all files first.
    trust_remote_code: copy the Python code that comes with the model.

    A float folder cannot say how inputs are rounded when it runs: where layers or attentions do so,
    the log says that `out` does not. One shard is in memory at a time. Raises ValueError for a
    folder that is damaged, or an `out` that exists.
    """
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
