"""The quantization method "lowbit" of vLLM: which layer runs how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.verify import quantization_section, quantized_entries, rounded_attentions
from lowbit.formats.embedding import tables_of
from lowbit.formats.widths import choose_widths, entry_widths
from lowbit.vllm_plugin.experts import LowbitExpertsMethod
from lowbit.vllm_plugin.linear import LowbitLinearMethod
from lowbit.vllm_plugin.pieces import Linker

MODEL = "the model"  # in errors about a config.json whose folder is not known
OPTION = "lowbit_bits"  # in vLLM's additional_config: as `bits` of lowbit.load

# For models that tell vLLM only after their linears are made (Qwen3-MoE with dense blocks).
STACKS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@register_quantization_config("lowbit")
class LowbitConfig(QuantizationConfig):
    """The quantization_config of a folder that lowbit has quantized.

    entries: the entries of the quantized linears, by the names that vLLM gives them.

    Raises ValueError for an invalid one, and for attentions that round queries, keys or values.
    """

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__()
        section = quantization_section({"quantization_config": section}, MODEL)
        self.entries: Mapping[str, dict[str, Any]] = quantized_entries(section, MODEL)
        if tables := tables_of(self.entries):
            raise ValueError(
                f"{tables[0]} is a packed table of embeddings, which vLLM's embedding cannot hold: "
                "quantize without --embedding-bits, or run this model with lowbit.load"
            )
        if attention := rounded_attentions(section, MODEL):
            raise ValueError(
                f"{next(iter(attention))} rounds its queries, keys or values, which vLLM's "
                "attention does not: run this model with lowbit.load, or export its weights with "
                "lowbit export --drop-activations"
            )
        self.linker = Linker()
        self._widths_chosen = False

    def get_name(self) -> str:
        """Returns the name of the method."""
        return "lowbit"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Returns the dtypes in which a model can run."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the lowest compute capability of a GPU: that of torch's own."""
        return 50

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns no names: everything stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LowbitConfig":
        """Returns the method of a quantization_config."""
        return cls(config)

    def maybe_update_config(self, model_name: str, *arguments: Any, **more: Any) -> None:
        """Checks the files of a folder against their hashes; models of the hub have no folder."""
        if Path(model_name).is_dir():
            QuantizedFolder(Path(model_name)).verify()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Renames the entries as vLLM renames the tensors of the model."""
        renamed = hf_to_vllm_mapper.apply_dict(dict(self.entries))
        for name, entry in renamed.items():
            if entry.get("shares") is not None:
                (owner,) = hf_to_vllm_mapper.apply_list([entry["shares"]])
                renamed[name] = {**entry, "shares": owner}
        self.entries = renamed

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Returns what runs a layer of vLLM; None: vLLM itself does."""
        self._choose_widths()
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        names = self._stacked(prefix)
        if any(name in self.entries for name in names):
            return LowbitLinearMethod(names, self.entries, self.linker)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _stacked(self, prefix: str) -> list[str]:
        """Returns the names of the linears that vLLM stacks in one."""
        owner, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last)
        if parts is None:
            parts = [last] if prefix in self.entries else STACKS.get(last, [last])
        return [f"{owner}.{part}" if owner else part for part in parts]

    def _experts(self, layer: Any, prefix: str) -> LowbitExpertsMethod | None:
        start = f"{prefix.partition('.experts')[0]}.experts"
        parts = {
            "w1": layer.ckpt_gate_proj_name,
            "w2": layer.ckpt_down_proj_name,
            "w3": layer.ckpt_up_proj_name,
        }
        names = {
            (number, shard): f"{start}.{number}.{part}"
            for number in range(layer.moe_config.num_experts)
            for shard, part in parts.items()
            if part is not None
        }
        if not any(name in self.entries for name in names.values()):
            return None
        return LowbitExpertsMethod(layer.moe_config, names, self.entries, self.linker)

    def _choose_widths(self) -> None:
        """Sets the widths that additional_config asks for, which only slices have."""
        if self._widths_chosen:
            return
        self._widths_chosen = True
        more = get_current_vllm_config().additional_config
        bits = more.get(OPTION) if isinstance(more, Mapping) else None
        if bits is None:
            return
        nested = {n: e["bits"] for n, e in self.entries.items() if entry_widths(e)}
        widths = choose_widths(nested, bits)
        for name, width in widths.items():
            entry = self.entries[name]
            if width not in entry_widths(entry):
                raise ValueError(
                    f"layer {name}: it is a slice of {entry['bits']} bits, which cannot run at "
                    f"{width} bits"
                )
        chosen = {name: {**self.entries[name], "bits": width} for name, width in widths.items()}
        self.entries = {**self.entries, **chosen}
