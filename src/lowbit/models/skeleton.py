"""Builds models without weights, and maps the names of tensors on disk to those in memory."""

from collections.abc import Iterable
from typing import Any

from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowbit.blocks.experts import ExpertNames, is_fused, unfuse
from lowbit.kernels.products import share_products
from lowbit.models.auto_class import auto_class
from lowbit.models.conv1d import linears_for_conv1d


def build_skeleton(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns the model of a config, without weights and with unfused experts.

    A Conv1D becomes an nn.Linear. Parameters are on the meta device; buffers, such as rotary
    tables, have their values.
    """
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    model.eval()
    linears_for_conv1d(model)
    unfuse_experts(model)
    share_products(model)
    return model


def unfuse_experts(model: PreTrainedModel, only: Iterable[str] | None = None) -> list[str]:
    """Replaces fused experts by one linear per matrix; returns the names of the replaced modules.

    only: names in memory of linears; only experts that contain one of them are replaced. None: all.
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
    """Returns the names on disk of an expert's matrices, from transformers' conversion table."""
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
    """Returns the names in memory of tensors, by their names on disk.

    model: with unfused experts. The tensors of a quantized layer are renamed in the same way as its
        float weight.
    """
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    modules = {name: True for name, _ in model.named_modules()}
    state = _StateWithModules(model.state_dict(), modules)
    return {
        name: rename_source_key(name, rules, [], model.base_model_prefix, state)[0]
        for name in disk_names
    }


class _StateWithModules(dict[str, Any]):
    """A state dict that also has a key NAME.x for every module NAME and any x.

    So transformers renames packed tensors, which the float model does not have.
    """

    def __init__(self, state: dict[str, Any], modules: dict[str, bool]) -> None:
        super().__init__(state)
        self.modules = modules

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, self.modules.get(key.rpartition(".")[0], default))
