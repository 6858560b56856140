"""A folder to a model that runs; and the plugin through which plain transformers does the same.

Importing this module registers quant_method "lowbit" with transformers, so that after
`import lowbit` AutoModelForCausalLM.from_pretrained(folder) works, on CPU and CUDA and with any
device_map. Everything is checked before the first weight is read.
"""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.checkpoint.slices import slices_of, widths_of
from lowbit.checkpoint.verify import (
    quantization_section,
    quantized_entries,
    read_config,
    rounded_attentions,
)
from lowbit.formats import build, link
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.nested import NestedLinear, slice_tensors
from lowbit.formats.nested.widths import WidthPlan, set_bits
from lowbit.models.attention import round_attentions
from lowbit.models.locate import locate
from lowbit.models.skeleton import memory_names, unfuse_experts
from lowbit.models.streamed import StreamedModel, load_config
from lowbit.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def load(
    model: str | Path,
    *,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    bits: WidthPlan | None = None,
) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a quantized or a float folder, or of a hub id.

    device_map: as transformers takes it; None: everything on the CPU. dtype: of all that is not
    quantized; None: float32 on the CPU (half precision there is hundreds of times slower), else the
    checkpoint's own. verify=False skips the hashes, not the shapes. bits: of a folder that MatQuant
    made, only these slices are kept, cut while it is read: one width, {name or pattern: width}, or
    the path of a YAML file of that; None: the 8-bit codes, for `set_bits`. Raises ValueError that
    names the file or tensor that is wrong.
    """
    folder = locate(model, trust_remote_code)
    return (
        load_model(folder, device_map, dtype, verify, trust_remote_code, bits),
        load_tokenizer(folder, trust_remote_code),
    )


def load_model(
    folder: Path,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    bits: WidthPlan | None = None,
) -> PreTrainedModel:
    """The model alone; see `load`."""
    section = read_config(folder).get("quantization_config")
    verified = None
    if isinstance(section, dict) and section.get("quant_method") == "lowbit":
        QuantizedFolder(folder).verify(hashes=verify)
        verified = VerifiedSection(section, bits)
    elif bits is not None:
        raise ValueError(f"{folder} is a float model: bits is for what lowbit has quantized")
    else:
        check_float(folder)
    if bits is not None and "disk" in _places(device_map):
        raise ValueError(
            f"{folder}: slices are cut in memory; to have layers on the disk, write a folder of "
            "the slice first"
        )
    with _refused(folder):
        config = load_config(folder, trust_remote_code)
        if verified is not None:
            config.quantization_config = verified
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or (torch.float32 if _on_cpu(device_map) else "auto"),
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model, report = loaded
        if report["missing_keys"]:  # transformers has invented them
            raise ValueError(f"tensor {min(report['missing_keys'])} is missing")
    return model


def set_widths(model: PreTrainedModel, folder: Path, bits: WidthPlan) -> None:
    """Runs the model of a folder, which holds the masters, at other widths from now on.

    bits: as `load` takes it, with names on disk; what it does not name runs at its folder's width.
    """
    set_bits(model, widths_of(QuantizedFolder(folder), bits))


def stream(
    folder: Path, trust_remote_code: bool = False, bits: WidthPlan | None = None
) -> StreamedModel:
    """The model of a float or a quantized folder, to be run block by block in float32.

    bits: the widths at which the masters of a folder that matquant made run; see `load`. Raises
    ValueError that names the file or tensor that is wrong.
    """
    section = read_config(folder).get("quantization_config")
    config = load_config(folder, trust_remote_code)
    if section is None and bits is None:
        check_float(folder)
        return StreamedModel(folder, config, trust_remote_code)
    quantized = QuantizedFolder(folder)
    quantized.verify()
    entries = dict(quantized.entries)
    if bits is not None:
        widths = widths_of(quantized, bits)
        entries |= {name: {**entries[name], "bits": width} for name, width in widths.items()}

    def prepare(model: PreTrainedModel) -> None:
        replace_linears(model, entries)
        mark_attentions(model, quantized.attention)

    return StreamedModel(folder, config, trust_remote_code, prepare)


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Turns what transformers makes of a bad config.json, whatever it is, into a ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{folder} cannot be loaded: {kind}{error}") from error


def check_float(folder: Path) -> None:
    """A folder that claims not to be quantized: whole shards, no pickles, no marker of ours."""
    for name, info in CheckpointReader(folder).tensors.items():
        if 0 in info.shape:
            raise ValueError(
                f"{folder}: tensor {name} is empty, as where lowbit has quantized, "
                "but config.json says nothing of it"
            )


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
        self.on_cpu = _on_cpu(kwargs.get("device_map"))
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
            entries, attention, marker = folder.entries, folder.attention, folder.marker
            self.sliced = slices_of(folder, getattr(section, "bits", None))
            entries = entries | self.sliced
        else:
            entries, marker = quantized_entries(section, "the model"), section["marker"]
            attention = rounded_attentions(section, "the model")
        replace_linears(model, entries)
        mark_attentions(model, attention)
        ignored = re.escape(memory_names(model, [marker])[marker])
        unexpected = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*unexpected, f"^{ignored}$"}
        if files:
            check_complete(model, folder, self.sliced)

    def get_weight_conversions(self) -> list[WeightTransform]:
        # On the CPU, so that a GPU never holds more than the slices.
        cut = WeightConverter([r"\.master$"], [".packed"], [CutSlice()], force_cpu=True)
        return [cut] if self.sliced else []

    def is_serializable(self) -> bool:
        """No: the folder itself is the serialized form, with its hashes."""
        logger.warning("a model that lowbit quantized is not written again: copy its folder")
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class CutSlice(ConversionOps):
    """Cuts a layer's slice as soon as its master is read, which is then let go."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        ((master,),) = input_dict.values()
        layer = kwargs["model"].get_submodule(kwargs["full_layer_name"].rpartition(".")[0])
        assert isinstance(layer, NestedLinear)
        return {f".{key}": [tensor] for key, tensor in slice_tensors(layer.spec, master).items()}


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
            new = made[weight.removesuffix(".weight")] = build(entry)
        if isinstance(new, NestedLinear):
            new.stored_as = weight.removesuffix(".weight")
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
    """Every tensor that the model needs is there in its shape; transformers would invent it.

    sliced: layers, by name on disk, of which a slice is made from the master that is there.
    """
    model = deepcopy(model)  # on meta
    unfuse_experts(model)  # those that are all float and that transformers will join
    names = memory_names(model, folder.reader.tensors)
    present = {memory: folder.reader.tensors[disk] for disk, memory in names.items()}
    masters = [names[f"{name}.master"].removesuffix("master") for name in sliced]
    cut = {f"{master}{part}" for master in masters for part in ("packed", "overflow")}
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in model.state_dict().items():
        if name in cut:
            continue
        twins = {tied.get(name, name), *(t for t, s in tied.items() if s == tied.get(name, name))}
        if name not in present and not any(twin in present for twin in twins):
            raise ValueError(f"{folder.folder}: tensor {name} is missing")
        info = present.get(name)
        if info is not None and info.shape != tuple(tensor.shape):
            raise ValueError(
                f"{folder.folder}: tensor {name} has shape {list(info.shape)}, "
                f"the model needs {list(tensor.shape)}"
            )
        if info is not None and info.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(f"{folder.folder}: tensor {name} is {info.dtype}")


def _on_cpu(device_map: Any) -> bool:
    """Whether a device_map keeps everything on the CPU (or on disk, to be computed there)."""
    places = _places(device_map)
    automatic = ("auto", "balanced", "balanced_low_0", "sequential")
    if any(place in automatic for place in places if isinstance(place, str)):
        return not torch.cuda.is_available()
    return all(place is None or str(place) in ("cpu", "disk") for place in places)


def _places(device_map: Any) -> list[Any]:
    return list(device_map.values()) if isinstance(device_map, dict) else [device_map]
