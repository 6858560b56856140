"""Builds models without weights, and maps the names of tensors on disk to those in memory."""

from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowbit.blocks.experts import ExpertNames, Piece, UnfusedExperts, layout_of, unfuse
from lowbit.checkpoint.views import Place, View
from lowbit.kernels.products import share_products
from lowbit.models.auto_class import auto_class
from lowbit.models.conv1d import linears_for_conv1d

LARGE = 2**24  # values of a tensor that is never made on the CPU
IMPOSSIBLE = 2**40  # values of a tensor that no model has; torch refuses it on the CPU


def build_skeleton(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns the model of a config, without weights and with unfused experts.

    A Conv1D becomes an nn.Linear. Parameters are on the meta device; buffers, such as rotary
    tables, have their values.
    """
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        # In the dtype of the config, buffers such as Gemma's embed_scale would be rounded to it.
        # from_config writes the dtype into the config.
        model = auto_class(config).from_config(
            deepcopy(config), trust_remote_code=trust_remote_code, dtype=torch.float32
        )
    model.eval()
    linears_for_conv1d(model)
    unfuse_experts(model)
    share_products(model)
    return model


class _LargeOnMeta(TorchFunctionMode):
    """Makes large empty tensors on the meta device at once.

    `init_empty_weights` moves a parameter there after it was made: for the experts of DeepSeek-V3,
    30 GB a block.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is torch.empty
            and kwargs.get("device") is None
            and LARGE <= _values(args) < IMPOSSIBLE
        ):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _values(sizes: Any) -> int:
    """Returns the number of values of a tensor with these sizes, given one by one or together."""
    each = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    return prod(each) if all(isinstance(size, int) for size in each) else 0


def unfuse_experts(model: PreTrainedModel, only: Iterable[str] | None = None) -> list[str]:
    """Replaces fused experts by one linear per matrix; returns the names of the replaced modules.

    only: names in memory of linears; only experts that contain one of them are replaced. None: all.
    """
    fused = [name for name, module in model.named_modules() if layout_of(module)]
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
    readers, down = parts.get("gate_up_proj", parts.get("up_proj", [])), parts.get("down_proj", [])
    if len(readers) not in (1, 2) or len(down) != 1:
        return ExpertNames("gate_proj", "up_proj", "down_proj")
    gate = readers[0] if len(readers) == 2 else None
    return ExpertNames(gate, readers[-1], *down)


def memory_names(model: PreTrainedModel, disk_names: Iterable[str]) -> dict[str, str]:
    """Returns the names in memory of tensors, by their names on disk.

    model: with unfused experts. The tensors of a quantized layer are renamed in the same way as its
        float weight.
    """
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    modules = {name: True for name, _ in model.named_modules() if name}
    state = _StateWithModules(model.state_dict(), modules)
    prefix = model.base_model_prefix
    return {name: _in_memory(name, rules, prefix, state) for name in disk_names}


def _in_memory(
    name: str, rules: list[WeightRenaming], prefix: str, state: "_StateWithModules"
) -> str:
    """Returns the name in memory of one tensor, as transformers finds it."""
    renamed: str = rename_source_key(name, rules, [], prefix, state)[0]
    if state.get(renamed) is None:
        plain: str = rename_source_key(name, [], [], prefix, state)[0]
        return plain if state.get(plain) is not None else renamed
    return renamed


class _StateWithModules(dict[str, Any]):
    """A state dict that also has a key NAME.x for every module NAME and any x.

    So transformers renames packed tensors, which the float model does not have.
    """

    def __init__(self, state: dict[str, Any], modules: dict[str, bool]) -> None:
        super().__init__(state)
        self.modules = modules

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, self.modules.get(key.rpartition(".")[0], default))


def views_of(model: PreTrainedModel, disk_names: Iterable[str]) -> dict[str, View]:
    """Returns the tensors of a model that its folder stores in another form, by name in memory.

    These are the matrices of experts that are stacked on disk, and what transformers computes from
    stored tensors when it loads the model (`WeightConverter`), such as a convolution that is stored
    in three parts.

    model: with unfused experts.
    """
    state = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    known = _StateWithModules(state, {name: True for name, _ in model.named_modules() if name})
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, UnfusedExperts)}
    views: dict[str, View] = {}
    converted: dict[str, list[tuple[str, str]]] = defaultdict(list)
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for disk in disk_names:
        plain = _in_memory(disk, renamings, prefix, known)
        if plain in state:
            continue
        path = next((path for path in stacks if plain.startswith(f"{path}.")), None)
        if path is not None:
            stack = plain.removeprefix(f"{path}.")
            views |= _experts_of(stacks[path], path, stack, disk)
            continue
        target, pattern = rename_source_key(disk, renamings, converters, prefix, known)
        if pattern is not None and target in state:
            converted[target].append((pattern, disk))
    for target, parts in converted.items():
        views |= _converted(model, by_pattern[parts[0][0]], target, parts)
    return views


def _experts_of(experts: UnfusedExperts, path: str, stack: str, disk: str) -> dict[str, View]:
    """Returns views of all matrices that one stack holds."""
    views = {}
    for name, piece in experts.layout.pieces(experts.names).items():
        if piece.stack == stack:
            place = _place(piece)
            for number in range(len(experts)):
                linear, _, attribute = name.partition(".")
                shape = getattr(getattr(experts[number], linear), attribute).shape
                make = partial(_one_expert, piece, number)
                view = View((disk,), make, tuple(shape), place)
                views[f"{path}.{number}.{name}"] = view
    return views


def _place(piece: Piece) -> Place:
    start, step = piece.rows.start or 0, piece.rows.step or 1
    return Place(start, step, piece.transposed, flat=piece.height is not None)


def _one_expert(piece: Piece, number: int, stacks: list[Any]) -> Tensor:
    return piece.of(stacks[0], number)


def _converted(
    model: PreTrainedModel, rule: WeightConverter, target: str, parts: list[tuple[str, str]]
) -> dict[str, View]:
    """Returns views of the tensors that a rule makes of stored tensors.

    target: the name in memory of the first of them.
    parts: the patterns of the rule, and the names on disk that match them.
    """
    state = model.state_dict()
    first = rule.target_patterns[0]
    disk = tuple(name for _, name in parts)

    def make(pattern: str, stored: list[Any]) -> Tensor:
        collected: dict[str, Any] = defaultdict(list)
        for (source, _), tensor in zip(parts, stored, strict=True):
            collected[source].append(tensor[...])
        for operation in rule.operations:
            collected = operation.convert(
                collected,
                source_patterns=rule.source_patterns,
                target_patterns=rule.target_patterns,
                full_layer_name=target,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        made = collected[pattern]
        one: Tensor = made[0] if isinstance(made, list) else made
        return one

    views = {}
    for pattern in rule.target_patterns:
        name = target.replace(first, pattern)
        if name in state:
            views[name] = View(disk, partial(make, pattern), tuple(state[name].shape))
    return views
