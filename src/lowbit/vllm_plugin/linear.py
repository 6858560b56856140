"""What vLLM calls for a linear layer, or for several that it stacks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearMethodBase

from lowbit.vllm_plugin.pieces import (
    Entries,
    Linker,
    Pieces,
    built,
    part_of_layer,
    place_in_stack,
    tensor_names,
)


class LowbitLinearMethod(LinearMethodBase):
    """Runs lowbit's layers in place of one linear of vLLM.

    names: the linears that are stacked in it, in the order of their outputs.
    entries: the entries of config.json by name; a linear without one is not quantized.
    linker: links layers that share tensors.
    """

    def __init__(self, names: list[str], entries: Entries, linker: Linker) -> None:
        self.names = names
        self.entries = {name: entries.get(name) for name in names}
        self.linker = linker
        self.pieces = Pieces()
        self.input_size = 0
        self.sizes: list[int] = []

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """Adds a placeholder of every tensor to the layer."""
        self.input_size, self.sizes = input_size_per_partition, list(output_partition_sizes)
        names = tensor_names([entry for entry in self.entries.values() if entry is not None])
        self.pieces.register(layer, names, self._load)

    def _load(self, name: str, parameter: Any, tensor: Tensor, shard: Any = None) -> None:
        self.pieces.keep(shard, name, tensor)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replaces the placeholders by lowbit's layers."""
        found = self.pieces.take()
        shards = sorted(found, key=place_in_stack)
        if len(shards) != len(self.names):
            raise ValueError(
                f"{', '.join(self.names)}: vLLM loaded tensors of {len(shards)} of these linears"
            )
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        for name in [name for name, p in layer.named_parameters() if not p.numel()]:
            if hasattr(getattr(layer, name, None), "weight_loader"):
                delattr(layer, name)
        parts = nn.ModuleList()
        for number, (name, shard) in enumerate(zip(self.names, shards, strict=True)):
            with torch.inference_mode(False):
                whole = built(name, self.entries[name], found.pop(shard))
                part = part_of_layer(whole, *self._cut(layer, number, whole)).to(device)
            self.linker.add(name, part)
            parts.append(part)
        layer.lowbit = parts

    def _cut(
        self, layer: nn.Module, number: int, whole: Any
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the rows and the inputs of a linear that this device holds."""
        rows, columns = _shape(whole)
        rank, devices = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        if devices == 1:
            return (0, rows), (0, columns)
        if len(self.sizes) != len(self.names):
            raise ValueError(
                f"layer {self.names[number]} holds several linears in one, which lowbit does not "
                "cut: run it with tensor_parallel_size=1"
            )
        first_row = _start(rows, self.sizes[number], rank, devices)
        first_input = _start(columns, self.input_size, rank, devices)
        return (
            (first_row, min(first_row + self.sizes[number], rows)),
            (first_input, first_input + self.input_size),
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns x times the weight: (..., out) of this device."""
        outputs = [part(x) for part in layer.lowbit]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        missing = sum(self.sizes) - y.shape[-1]  # vLLM fills the vocabulary up
        y = functional.pad(y, (0, missing)) if missing > 0 else y
        return y if bias is None else y + bias

    def dequantize_weight(self, layer: Any) -> Tensor:
        """Returns the weight in float, which latent attention takes apart."""
        return torch.cat([part.dequantize() for part in layer.lowbit])


def _shape(layer: Any) -> tuple[int, int]:
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if weight is not None else (layer.out_features, layer.in_features)


def _start(whole: int, part: int, rank: int, devices: int) -> int:
    """Returns where the part of a device begins; several devices may hold the same part."""
    parts = -(-whole // part)
    return part * (rank * parts // devices)
