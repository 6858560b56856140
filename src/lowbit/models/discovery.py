"""Makes a table for an architecture that has none, from the structure of the model.

The blocks are the nn.ModuleList with the most parameters. A forward pass of each block on the meta
device, without data, shows which linears receive the same tensor: these form a group. The table has
no folds, because the structure does not show where a scale can be folded.
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
from lowbit.models.auto_class import language_model
from lowbit.models.family import Family, Group, always

# A module with one of these names, or inside a module with one of them, is a router of experts.
ROUTERS = ("gate", "router", "shared_expert_gate")
TOKENS = 8  # length of the text of the forward pass


def discover(model: nn.Module) -> Family:
    """Returns a `Family` for a model whose architecture has no table.

    model: the model on the meta device, with unfused experts.

    Raises ValueError if its blocks cannot be found, or do not run on the meta device.
    """
    path = _largest_list(model)
    architecture = type(model).__name__
    try:
        tuple_output, calls = _calls(model, path)
        blocks = [deepcopy(block).to("meta") for block in model.get_submodule(path).children()]
        inputs = [_inputs(block, call) for block, call in zip(blocks, calls, strict=True)]
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"lowbit has no table for {architecture}, and cannot run its blocks without data to "
            f"make one ({error}): add a table of about 30 lines, as CONTRIBUTING.md explains"
        ) from None
    groups: dict[tuple[str, ...], Group] = {}
    skip: set[str] = set()
    for block, block_inputs in zip(blocks, inputs, strict=True):
        linears, routers = _linears(block)
        skip.update(routers)
        for names in _by_input(linears, block_inputs) + _expert_groups(block):
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
    """The path of the nn.ModuleList with the most parameters."""
    within = language_model(model)
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not isinstance(module, UnfusedExperts)
        and f"{name}.".startswith(f"{within}." if within else "")
    }
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks (nn.ModuleList), and lowbit has no "
            "table for it: add a table of about 30 lines, as CONTRIBUTING.md explains"
        )
    return max(lists, key=lambda name: lists[name])


def _calls(model: nn.Module, path: str) -> tuple[bool, list[Batch]]:
    """Returns whether blocks return tuples, and the arguments of each block, on the meta device.

    The arguments are those for a text of TOKENS tokens. Everything outside the blocks runs on the
    CPU, with an embedding of one row, because masks cannot always be made on the meta device.
    """
    copy = deepcopy(model)
    blocks = list(copy.get_submodule(path).children())
    parent, _, attribute = path.rpartition(".")
    holder = copy.get_submodule(parent)
    setattr(holder, attribute, nn.ModuleList())
    embedding = copy.get_input_embeddings()  # type: ignore[operator]
    embedding.padding_idx = None
    embedding.weight = nn.Parameter(torch.zeros(1, embedding.weight.shape[1]))
    for module in copy.base_model.modules():  # type: ignore[union-attr]
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape)))
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    first = BlockStub(blocks[0], tuple_output=False, stop=True)
    setattr(holder, attribute, nn.ModuleList([first, *blocks[1:]]))
    with torch.no_grad(), suppress(Stopped):
        copy.base_model(input_ids=tokens, use_cache=False)  # type: ignore[operator]
    (call,) = _to_meta(first.calls)
    out = _on_meta(deepcopy(blocks[0]).to("meta"), call)
    tuple_output = isinstance(out, tuple)
    stubs = [BlockStub(block, tuple_output) for block in blocks]
    setattr(holder, attribute, nn.ModuleList(stubs))
    with torch.no_grad():
        copy.base_model(input_ids=tokens, use_cache=False)  # type: ignore[operator]
    return tuple_output, _to_meta([stub.calls[0] for stub in stubs])


def _to_meta(calls: Sequence[Batch]) -> list[Batch]:
    """Moves calls to the meta device; state that several blocks share remains shared."""
    meta = torch.device("meta")
    kwargs = move([call.kwargs for call in calls], meta)
    return [Batch(call.hidden.to(meta), own) for call, own in zip(calls, kwargs, strict=True)]


def _on_meta(block: nn.Module, call: Batch) -> Any:
    """The block's output on the meta device.

    Routing needs data, so experts are replaced by the identity.
    """
    experts = [module for module in block.modules() if isinstance(module, UnfusedExperts)]
    for module in experts:
        module.forward = lambda hidden, index, weights: hidden  # type: ignore[assignment, method-assign]
    with torch.no_grad():
        out = block(call.hidden, **call.kwargs)
    for module in experts:
        del module.forward
    return out


def _inputs(block: nn.Module, call: Batch) -> dict[str, Tensor]:
    """The input of every linear that runs, by name."""
    inputs: dict[str, Tensor] = {}
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    with observed(block, linears, inputs.__setitem__):
        _on_meta(block, call)
    return inputs


def _linears(block: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the linears outside experts, and of the routers, which may be of any class."""
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


def _by_input(linears: list[str], inputs: dict[str, Tensor]) -> list[tuple[str, ...]]:
    """Groups of linears whose input is the same tensor."""
    by_tensor: dict[int, list[str]] = defaultdict(list)
    for name in linears:
        if name in inputs:  # a linear that did not run gets no group, which `SourceModel` reports
            by_tensor[id(inputs[name])].append(name)
    return [tuple(names) for names in by_tensor.values()]


def _expert_groups(block: nn.Module) -> list[tuple[str, ...]]:
    """Two groups for each expert: gate and up projection, and the down projection."""
    groups = []
    for name, module in block.named_modules():
        if isinstance(module, Expert):
            gate, up, down = (f"{name}.{part}" for part in vars(module.names).values())
            groups += [(gate, up), (down,)]
    return groups
