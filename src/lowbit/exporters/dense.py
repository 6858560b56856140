"""The target `dense`: all weights in float, which every program reads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.card_facts import in_transformers
from lowbit.exporters.exporter import StoredLayer
from lowbit.exporters.folder import FolderExporter, float_weight
from lowbit.formats.base import QuantizedLinear


class DenseExporter(FolderExporter):
    """Writes the dequantized weights of layers of every format as a plain float model.

    The weights have the dtype that was chosen, or that of the model that was quantized. A float
    model does not round inputs: a layer that does so loses it.
    """

    name = "dense"
    readers = "every program"
    parallel = True

    @property
    def usage(self) -> str:
        code = in_transformers(self.folder.config)
        return f"In vLLM: `vllm serve MODEL`.\n\nIn transformers:\n\n{code}"

    def store(self, name: str, layer: QuantizedLinear) -> StoredLayer:
        self.part(name)  # raises if it cannot be cut
        dtype = self.options.float_dtype or self.folder.float_dtype(name)
        weight = layer.dequantize()
        tensors = {"weight": float_weight(weight, dtype)}
        if layer.bias is not None:
            tensors["bias"] = self.store_float(name, layer.bias.detach())
        rounds = layer.activation is not None or layer.format == "sorted_group"
        loss = "its inputs are no longer rounded" if rounds else None
        named = str(dtype).removeprefix("torch.")
        equal = torch.equal(tensors["weight"].float(), weight)
        return StoredLayer(named, tensors, (), loss, None if equal else named)

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float()

    def error(self, layer: QuantizedLinear, weight: Tensor) -> float:
        """Returns 0: rounding to a dtype is said by `StoredLayer.rounded`, not in steps."""
        return 0.0

    def quantization(self) -> dict[str, Any] | None:
        return None

    def check_attention(self) -> None:
        """Does nothing: as for layers, the loss is said instead of refused."""
