"""Linears that vLLM and SGLang stack into one matrix, and how all of a stack must be stored.

They stack queries, keys and values, gate and up, and all experts of a block. Those of a stack must
be stored alike: in one width, in groups of one size, and all with zero points or all without.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd

STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class Kind:
    """How a layer can be stored.

    bits: width of a code.
    symmetric: whether it has no zero points.
    group_size: inputs of a group; None: a whole row.
    part: inputs of a row that one device holds.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    part: int

    @classmethod
    def joined(cls, kinds: Sequence["Kind"]) -> "Kind":
        """Returns one kind in which layers of all these kinds can be stored exactly."""
        symmetric = all(kind.symmetric for kind in kinds)
        bits, part = max(kind.bits for kind in kinds), gcd(*(kind.part for kind in kinds))
        if all(kind.group_size is None for kind in kinds):
            return cls(bits, symmetric, None, part)
        size = gcd(*(kind.group_size or kind.part for kind in kinds))
        return cls(bits, symmetric, size, part)


def stack_of(name: str) -> str:
    """Returns the name of the stack that a linear is part of; without one, its own name."""
    owner, _, last = name.rpartition(".")
    if ".experts." in name:
        return f"{name.partition('.experts.')[0]}.experts"
    for parts in STACKS:
        if last in parts:
            return f"{owner}.({', '.join(parts)})"
    return name


def stacks_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the linears of each stack, by its name; a linear of no stack is one of its own."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stacks[stack_of(name)].append(name)
    return dict(stacks)


def partly_quantized(quantized: Iterable[str], floats: Iterable[str]) -> list[str]:
    """Returns the stacks of which some linears are quantized and others are not."""
    return sorted(set(stacks_of(quantized)) & {stack_of(name) for name in floats})
