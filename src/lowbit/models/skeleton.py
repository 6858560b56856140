"""A model without its weights, and the two names that each tensor has: in memory and on disk."""

from collections.abc import Iterable
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowbit.blocks.experts import ExpertNames, is_fused, unfuse


def build_skeleton(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config: parameters on meta, buffers (rotary tables) real, experts unfused."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.eval()
    unfuse_experts(model)
    return model


def unfuse_experts(model: PreTrainedModel, only: Iterable[str] | None = None) -> list[str]:
    """Replaces fused experts by one linear per matrix; returns the names of the modules replaced.

    `only`: replace those that have one of these linears below them (names in memory).
    """
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    if only is not None:
        wanted = list(only)
        fused = [f for f in fused if any(name.startswith(f + ".") for name in wanted)]
    if not fused:
        return []
    names = _expert_names(model)
    for name in fused:
        parent, _, attribute = name.rpartition(".")
        experts = unfuse(model.get_submodule(name), names)
        setattr(model.get_submodule(parent), attribute, experts)
    return fused


def _expert_names(model: PreTrainedModel) -> ExpertNames:
    """What transformers' own conversion table calls the matrices of an expert on disk."""
    parts: dict[str, list[str]] = {}
    for rule in get_model_conversion_mapping(model):
        if isinstance(rule, WeightConverter):
            target = rule._original_target_patterns[0].rpartition(".")[2]
            parts[target] = [s.split(".")[-2] for s in rule._original_source_patterns]
    gate_up, down = parts.get("gate_up_proj", []), parts.get("down_proj", [])
    if len(gate_up) != 2 or len(down) != 1:
        return ExpertNames("gate_proj", "up_proj", "down_proj")
    return ExpertNames(*gate_up, *down)


def memory_names(model: PreTrainedModel, disk_names: Iterable[str]) -> dict[str, str]:
    """Name in memory by name on disk, for a model whose experts are unfused.

    Quantized tensors are renamed as the weights that they stand for would be.
    """
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    known = model.state_dict()
    modules = {name: True for name, _ in model.named_modules()}
    known_or_below = _WithModules(known, modules)
    return {
        name: rename_source_key(name, rules, [], model.base_model_prefix, known_or_below)[0]
        for name in disk_names
    }


class _WithModules(dict[str, Any]):
    """A state dict that also knows NAME.anything for every module NAME: packed tensors."""

    def __init__(self, known: dict[str, Any], modules: dict[str, bool]) -> None:
        super().__init__(known)
        self.modules = modules

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, self.modules.get(key.rpartition(".")[0], default))
