"""Slices of a folder that matquant made, cut while transformers reads it."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.widths import CODES, SLICE_TENSORS, cut_tensors


class CutSlice(ConversionOps):
    """Cuts a layer's slice as soon as its 8-bit codes are read, which are then let go."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        ((codes,),) = input_dict.values()
        layer = kwargs["model"].get_submodule(kwargs["full_layer_name"].rpartition(".")[0])
        assert isinstance(layer, QuantizedLinear)
        return {f".{key}": [tensor] for key, tensor in cut_tensors(layer, codes).items()}


def slice_conversions() -> list[WeightTransform]:
    """What transformers must do with the codes of all layers."""
    # On the CPU, so that a GPU never holds more than the slices.
    target = f".{SLICE_TENSORS[0]}"
    return [WeightConverter([rf"\.{CODES}$"], [target], [CutSlice()], force_cpu=True)]


def cut_names(sliced: Collection[str], in_memory: Mapping[str, str]) -> set[str]:
    """The names in memory of the tensors that slices have and the folder has not.

    sliced: the layers, by name on disk. in_memory: names of tensors in memory, by name on disk.
    """
    layers = [in_memory[f"{name}.{CODES}"].removesuffix(CODES) for name in sliced]
    return {f"{layer}{tensor}" for layer in layers for tensor in SLICE_TENSORS}
