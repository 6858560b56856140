"""Makes the `LinearGroup`s and `Fold`s of a block from the table of its family."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blocks import Fold, LinearGroup
from lowbit.models.family import Family, FoldRule, rotary_channels


def groups_of(
    family: Family, config: Any, block: nn.Module, index: int = 0
) -> tuple[LinearGroup, ...]:
    """Returns the groups of a block; a rule for experts makes one group for each expert.

    index: the index of the block, from 0.
    """
    if family.by_block:
        return tuple(LinearGroup(group.name, group.linears) for group in family.by_block[index])
    modules = dict(block.named_modules())
    groups: list[LinearGroup] = []
    for group in family.groups(config):
        for number, linears in _matches(group.linears, modules, family):
            groups.append(LinearGroup(group.name.replace("*", number), linears))
    return tuple(groups)


def folds_of(family: Family, config: Any, block: nn.Module, index: int = 0) -> tuple[Fold, ...]:
    """Returns the folds of a block, in an order in which they can be applied.

    index: the index of the block, from 0.
    """
    if family.search is not None:
        return family.search(block, index)
    modules = dict(block.named_modules())
    folds: list[Fold] = []
    for rule in family.folds(config):
        if "*" in rule.source:
            for _, names in _matches((rule.source, *rule.readers), modules, family):
                folds.append(_fold(rule, names[0], names[1:], config, modules))
            continue
        readers = tuple(name for pattern in rule.readers for name in _expand(pattern, modules))
        if _applies(rule, modules, family) and _has_weight(modules[rule.source]):
            folds.append(_fold(rule, rule.source, readers, config, modules))
    return tuple(folds)


def matrices_of(block: nn.Module) -> dict[str, int]:
    """Returns the number of weights of a block's parameters with two or more dimensions, by name.

    The names have no ".weight" at the end.
    """
    return {
        name.removesuffix(".weight"): parameter.numel()
        for name, parameter in sorted(block.named_parameters())
        if parameter.dim() >= 2
    }


def _expand(pattern: str, modules: dict[str, nn.Module]) -> list[str]:
    """The names of modules that match a pattern; `*` stands for the number of an expert."""
    if "*" not in pattern:
        return [pattern] if pattern in modules else []
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\Z")
    return [name for name in modules if expression.match(name)]


def _matches(
    patterns: tuple[str, ...], modules: dict[str, nn.Module], family: Family
) -> list[tuple[str, tuple[str, ...]]]:
    """Returns (number of the expert, names of its modules) for every expert.

    Without `*` in the patterns it returns one pair, with "" for the number; none if the block has
    none of the modules. Raises ValueError if it has only some of them.
    """
    matching = [_expand(pattern, modules) for pattern in patterns]
    if len({len(names) for names in matching}) > 1:
        raise ValueError(_incomplete(patterns, matching, family))
    if not any("*" in pattern for pattern in patterns):
        return [("", tuple(names[0] for names in matching))] if matching[0] else []
    prefix = next(p for p in patterns if "*" in p).partition("*")[0]
    return [
        (names[0].removeprefix(prefix).partition(".")[0], names)
        for names in zip(*matching, strict=True)
    ]


def _applies(rule: FoldRule, modules: dict[str, nn.Module], family: Family) -> bool:
    """Whether a block has the modules of a rule. Raises ValueError if it has only some readers."""
    matching = [_expand(reader, modules) for reader in rule.readers]
    if not any(matching) or rule.source not in modules:
        return False
    if not all(matching):
        raise ValueError(_incomplete(rule.readers, matching, family))
    return True


def _incomplete(patterns: tuple[str, ...], matching: list[list[str]], family: Family) -> str:
    pairs = zip(patterns, matching, strict=True)
    counts = ", ".join(f"{pattern}: {len(names)} found" for pattern, names in pairs)
    return (
        f"the table of family {family.name} does not fit this model: a block lacks modules that it "
        f"names ({counts}). Please report this architecture"
    )


def _fold(
    rule: FoldRule,
    source: str,
    readers: tuple[str, ...],
    config: Any,
    modules: dict[str, nn.Module],
) -> Fold:
    if rule.kind == "rotary":
        return _rotary_fold(rule, source, readers, config, modules)
    rows = None if rule.source_rows is None else rule.source_rows(config)
    size = _channels(modules[source]) if rows is None else len(rows)
    channel_map, head_width = None, 0
    if rule.kind == "values":
        heads = rule.heads(config)
        head_width = heads.width
        if heads.queries != heads.keys:
            by_head = torch.arange(size).view(heads.keys, heads.width)
            channel_map = by_head.repeat_interleave(heads.queries // heads.keys, 0).flatten()
    biased = all(_has_bias(modules[name]) for name in (source, *readers))
    return Fold(
        kind=rule.kind,
        source=source,
        readers=readers,
        size=size,
        source_rows=rows,
        reader_channels=channel_map,
        shiftable=biased and rule.kind in ("norm", "values"),
        head_width=head_width,
    )


def _rotary_fold(
    rule: FoldRule,
    source: str,
    readers: tuple[str, ...],
    config: Any,
    modules: dict[str, nn.Module],
) -> Fold:
    heads = rule.heads(config)
    channels, size = rotary_channels(heads)
    if isinstance(modules[source], nn.Linear):
        queries = channels.repeat_interleave(heads.queries // heads.keys, 0).flatten()
        keys = channels.flatten()
    else:  # a norm over the channels of one head, the same for all heads
        queries = keys = channels[0]
        size = size // heads.keys
    return Fold(
        kind="rotary",
        source=source,
        readers=readers,
        size=size,
        source_rows=None if rule.source_rows is None else rule.source_rows(config),
        source_channels=queries,
        reader_rows=None if rule.reader_rows is None else rule.reader_rows(config),
        reader_channels=keys,
    )


def _has_bias(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), Tensor)


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _channels(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
