"""The plugin through which plain transformers loads a folder that lowbit has quantized.

Importing this module registers quant_method "lowbit" with transformers, so that after
`import lowbit` AutoModelForCausalLM.from_pretrained(folder) works, on CPU and CUDA and with any
device_map. Everything is checked before the first weight is read.
"""

import logging
import re
from collections.abc import Collection, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.slices import slices_of
from lowbit.checkpoint.verify import (
    guard_of,
    quantization_section,
    quantized_entries,
    rounded_attentions,
)
from lowbit.formats import build, link, repack
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.widths import WidthPlan
from lowbit.load.slices import cut_names, slice_conversions
from lowbit.models.attention import round_attentions
from lowbit.models.skeleton import memory_names, unfuse_experts

logger = logging.getLogger(__name__)


class VerifiedSection(dict[str, Any]):
    """A quantization_config whose folder `load_model` has verified; no file can claim that.

    bits: what `load` was told to slice.
    """

    def __init__(self, section: dict[str, Any], bits: WidthPlan | None = None) -> None:
        super().__init__(section)
        self.bits = bits


@register_quantization_config("lowbit")
class LowbitConfig(QuantizationConfigMixin):
    """config.json's quantization_config; what is in it, `lowbit.checkpoint.verify` checks.

    Kept as one dictionary: as attributes its keys could replace methods and switch transformers.
    """

    def __init__(self, section: dict[str, Any]) -> None:
        self.quant_method = "lowbit"  # type: ignore[assignment]
        self.section = section

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        return (cls(config_dict), kwargs) if return_unused_kwargs else cls(config_dict)

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(dict(self.section))


@register_quantizer("lowbit")
class LowbitQuantizer(HfQuantizer):
    """Replaces linears on the meta device before transformers reads the weights."""

    requires_calibration = True  # only checkpoints that lowbit has quantized
    quantization_config: LowbitConfig
    sliced: dict[str, dict[str, Any]] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.on_cpu = on_cpu(kwargs.get("device_map"))
        section = self.quantization_config.section
        quantization_section({"quantization_config": section}, "the model")

    def update_attn_implementation(self, config: Any) -> Any:
        # Called before dtype="auto" is settled: the one place to prefer float32 on the CPU and yet
        # leave a dtype that the caller names alone.
        if self.on_cpu:
            config.dtype = torch.float32
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        section = self.quantization_config.section
        files = kwargs.get("checkpoint_files")
        if files:
            folder = QuantizedFolder(Path(files[0]).parent)
            if not isinstance(section, VerifiedSection):
                folder.verify()
            check_files(files, folder)
            entries, attention, guard = folder.entries, folder.attention, folder.guard
            self.sliced = slices_of(folder, getattr(section, "bits", None))
            entries = entries | self.sliced
        else:
            entries = quantized_entries(section, "the model")
            guard = guard_of(section, entries, "the model")
            attention = rounded_attentions(section, "the model")
        replace_linears(model, entries)
        mark_attentions(model, attention)
        ignored = re.escape(memory_names(model, [guard])[guard])
        unexpected = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*unexpected, f"^{ignored}$"}
        if files:
            check_complete(model, folder, self.sliced)

    def get_weight_conversions(self) -> list[WeightTransform]:
        return slice_conversions() if self.sliced else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        repack(model)

    def is_serializable(self) -> bool:
        """No: the folder itself is the serialized form, with its hashes."""
        logger.warning("a model that lowbit quantized is not written again: copy its folder")
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def replace_linears(model: PreTrainedModel, entries: dict[str, dict[str, Any]]) -> None:
    """Puts an empty QuantizedLinear where each entry says; ValueError where one does not fit."""
    weights = {f"{name}.weight": entry for name, entry in entries.items()}
    unfuse_experts(model, only=memory_names(model, weights).values())
    in_memory = memory_names(model, weights)
    made: dict[str, QuantizedLinear] = {}
    for weight, entry in weights.items():
        name = in_memory[weight].removesuffix(".weight")
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"config.json quantizes {name}, which this model does not have"
            ) from None
        with torch.device("meta"):
            new = build(entry)
        new.stored_as = weight.removesuffix(".weight")
        made[new.stored_as] = new
        _check_fits(name, old, new)
        path, _, attribute = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, attribute, new)
        if not any(True for _ in parent.buffers(recurse=False)):
            # Every tensor comes from the folder; some initialisers would look for LINEAR.weight.
            parent._is_hf_initialized = True  # type: ignore[assignment]
    link(made)


def mark_attentions(model: PreTrainedModel, attention: dict[str, dict[str, Any]]) -> None:
    """Makes attentions round what they read, by name on disk; ValueError where one cannot."""
    roundings = {f"{name}.rounding": rounding for name, rounding in attention.items()}
    inside = memory_names(model, roundings)
    by_memory = {inside[name].removesuffix(".rounding"): how for name, how in roundings.items()}
    round_attentions(model, by_memory)


def _check_fits(name: str, old: nn.Module, new: QuantizedLinear) -> None:
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"config.json quantizes {name}, which is a {type(old).__name__}, no linear"
        )
    wanted = (old.out_features, old.in_features, old.bias is not None)
    stated = (new.out_features, new.in_features, new.bias is not None)
    if wanted != stated:
        raise ValueError(
            f"layer {name} is (out, in, bias) {wanted} in this model, but config.json says {stated}"
        )


def check_files(files: Sequence[str], folder: QuantizedFolder) -> None:
    """transformers reads the shards that were verified, and no others that it may prefer."""
    read = sorted(Path(file).name for file in files)
    if read != folder.reader.files:
        raise ValueError(
            f"{folder.folder}: transformers would read {read}, "
            f"but config.json lists {folder.reader.files}; remove what does not belong there"
        )


def check_complete(
    model: PreTrainedModel, folder: QuantizedFolder, sliced: Collection[str] = ()
) -> None:
    """ValueError where the folder lacks a tensor of the model, which transformers would invent.

    sliced: the layers, by name on disk, whose tensors are cut from the 8-bit codes that are there.
    """
    model = deepcopy(model)  # on meta
    unfuse_experts(model)  # those that are all float and that transformers will join
    names = memory_names(model, folder.reader.tensors)
    present = {memory: folder.reader.tensors[disk] for disk, memory in names.items()}
    cut = cut_names(sliced, names)
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in model.state_dict().items():
        if name in cut:
            continue
        first = tied.get(name, name)
        same = {first, *(other for other, source in tied.items() if source == first)}
        if name not in present and not same & present.keys():
            raise ValueError(f"{folder.folder}: tensor {name} is missing")
        info = present.get(name)
        if info is not None and info.shape != tuple(tensor.shape):
            raise ValueError(
                f"{folder.folder}: tensor {name} has shape {list(info.shape)}, "
                f"the model needs {list(tensor.shape)}"
            )
        if info is not None and info.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(f"{folder.folder}: tensor {name} is {info.dtype}")


def on_cpu(device_map: Any) -> bool:
    """Whether a device_map keeps everything on the CPU (or on disk, to be computed there)."""
    places = places_of(device_map)
    automatic = ("auto", "balanced", "balanced_low_0", "sequential")
    if any(place in automatic for place in places if isinstance(place, str)):
        return not torch.cuda.is_available()
    return all(place is None or str(place) in ("cpu", "disk") for place in places)


def places_of(device_map: Any) -> list[Any]:
    return list(device_map.values()) if isinstance(device_map, dict) else [device_map]
