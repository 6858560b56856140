"""Cuts the slices of a MatQuant folder while transformers reads it."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.widths import CODES, SLICE_TENSORS, cut_tensors


class CutSlice(ConversionOps):
    """Cuts a layer's slice as soon as its 8-bit codes are read; the codes are then freed."""

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
    """Returns the conversions that transformers applies to the 8-bit codes of all layers."""
    # They run on the CPU, so that a GPU holds only the slices.
    target = f".{SLICE_TENSORS[0]}"
    return [WeightConverter([rf"\.{CODES}$"], [target], [CutSlice()], force_cpu=True)]


def entries_in_memory(
    sliced: Mapping[str, dict[str, Any]], stored: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns the entries of slices that are cut while they are read, by name on disk.

    All tensors but the codes are read as they are, so the slices keep every grid of the folder.

    sliced: the entries of the slices if they were stored.
    stored: the entries of all layers of the folder.
    """
    return {
        name: {**entry, "own_grids": stored[name].get("own_grids", [])}
        for name, entry in sliced.items()
    }


def cut_names(sliced: Collection[str], in_memory: Mapping[str, str]) -> set[str]:
    """Returns the names in memory of the tensors of slices, which are not in the folder.

    sliced: names on disk of the sliced layers.
    in_memory: names in memory of all tensors, by name on disk.
    """
    layers = [in_memory[f"{name}.{CODES}"].removesuffix(CODES) for name in sliced]
    return {f"{layer}{tensor}" for layer in layers for tensor in SLICE_TENSORS}
