"""An architecture without a table: find its blocks and groups by structure.

The blocks are the largest list of modules. A forward pass of each without data (on the meta device)
tells which linears receive the same tensor: those form a group. There are no folds: what may be
scaled cannot be seen from outside.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blocks.arguments import move
from lowbit.blocks.capture import BlockStub, Stopped, observed
from lowbit.blocks.experts import Expert, UnfusedExperts
from lowbit.blocks.stream import Batch
from lowbit.models.family import Family, Group, always

# A linear so named chooses experts, and so does one inside a module so named.
ROUTERS = ("gate", "router", "shared_expert_gate")
TOKENS = 8


def discover(model: nn.Module) -> Family:
    """A `Family` for a model whose architecture is in no table. model: on meta, experts unfused.

    Raises ValueError when the blocks cannot be found or do not run on the meta device.
    """
    path = _largest_list(model)
    architecture = type(model).__name__
    try:
        tuple_output, calls = _calls(model, path)
        blocks = [deepcopy(block).to("meta") for block in model.get_submodule(path).children()]
        inputs = [_inputs(block, call) for block, call in zip(blocks, calls, strict=True)]
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{architecture} has no table here and its blocks cannot be traced ({error}): "
            "add a table, about 30 lines; CONTRIBUTING.md tells how"
        ) from None
    groups: dict[tuple[str, ...], Group] = {}
    skip: set[str] = set()
    for block, seen in zip(blocks, inputs, strict=True):
        linears, routers = _linears(block)
        skip.update(routers)
        for names in _by_input(linears, seen) + _expert_groups(block):
            groups[names] = Group(names[0], names)
    return Family(
        name="discovered",
        architectures=(architecture,),
        blocks=path,
        groups=always(*groups.values()),
        folds=always(),
        skip=tuple(sorted(skip)),
        tuple_output=tuple_output,
    )


def _largest_list(model: nn.Module) -> str:
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not isinstance(module, UnfusedExperts)
    }
    if not lists:
        raise ValueError(f"{type(model).__name__}: no list of blocks was found; it needs a table")
    return max(lists, key=lambda name: lists[name])


def _calls(model: nn.Module, path: str) -> tuple[bool, list[Batch]]:
    """Whether blocks return tuples, and what each is called with for TOKENS tokens, on meta.

    Everything outside the blocks runs for real (masks may not be made on meta), on an embedding of
    one row.
    """
    twin = deepcopy(model)
    blocks = list(twin.get_submodule(path).children())
    parent, _, attribute = path.rpartition(".")
    holder = twin.get_submodule(parent)
    setattr(holder, attribute, nn.ModuleList())
    embedding = twin.get_input_embeddings()  # type: ignore[operator]
    embedding.padding_idx = None
    embedding.weight = nn.Parameter(torch.zeros(1, embedding.weight.shape[1]))
    for module in twin.base_model.modules():  # type: ignore[union-attr]
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape)))
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    first = BlockStub(blocks[0], tuple_output=False, stop=True)
    setattr(holder, attribute, nn.ModuleList([first, *blocks[1:]]))
    with torch.no_grad(), suppress(Stopped):
        twin.base_model(input_ids=tokens, use_cache=False)  # type: ignore[operator]
    (call,) = _to_meta(first.calls)
    out = _on_meta(deepcopy(blocks[0]).to("meta"), call)
    tuple_output = isinstance(out, tuple)
    stubs = [BlockStub(block, tuple_output) for block in blocks]
    setattr(holder, attribute, nn.ModuleList(stubs))
    with torch.no_grad():
        twin.base_model(input_ids=tokens, use_cache=False)  # type: ignore[operator]
    return tuple_output, _to_meta([stub.calls[0] for stub in stubs])


def _to_meta(calls: Sequence[Batch]) -> list[Batch]:
    """The calls of one forward pass without data; state that blocks share stays shared."""
    meta = torch.device("meta")
    kwargs = move([call.kwargs for call in calls], meta)
    return [Batch(call.hidden.to(meta), own) for call, own in zip(calls, kwargs, strict=True)]


def _on_meta(block: nn.Module, call: Batch) -> Any:
    """The block's output without data. Routing needs data: experts hand their input on."""
    experts = [module for module in block.modules() if isinstance(module, UnfusedExperts)]
    for module in experts:
        module.forward = lambda hidden, index, weights: hidden  # type: ignore[assignment, method-assign]
    with torch.no_grad():
        out = block(call.hidden, **call.kwargs)
    for module in experts:
        del module.forward
    return out


def _inputs(block: nn.Module, call: Batch) -> dict[str, Tensor]:
    """The input of every linear that runs."""
    seen: dict[str, Tensor] = {}
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    with observed(block, linears, seen.__setitem__):
        _on_meta(block, call)
    return seen


def _linears(block: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the linears outside experts, and of the routers (linears or other classes)."""
    experts = [f"{n}." for n, module in block.named_modules() if isinstance(module, UnfusedExperts)]
    linears, routers = [], []
    for name, module in block.named_modules():
        if name.startswith(tuple(experts)):
            continue
        if hasattr(module, "weight") and any(part in ROUTERS for part in name.split(".")):
            routers.append(name)
        elif isinstance(module, nn.Linear):
            linears.append(name)
    return linears, routers


def _by_input(linears: list[str], seen: dict[str, Tensor]) -> list[tuple[str, ...]]:
    by_tensor: dict[int, list[str]] = defaultdict(list)
    for name in linears:
        if name in seen:  # a linear that never runs stays in no group, and is reported
            by_tensor[id(seen[name])].append(name)
    return [tuple(names) for names in by_tensor.values()]


def _expert_groups(block: nn.Module) -> list[tuple[str, ...]]:
    found = []
    for name, module in block.named_modules():
        if isinstance(module, Expert):
            gate, up, down = (f"{name}.{part}" for part in vars(module.names).values())
            found += [(gate, up), (down,)]
    return found
