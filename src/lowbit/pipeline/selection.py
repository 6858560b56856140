"""Which linears of a model a run quantizes: all, but for --skip and --only."""

from collections.abc import Sequence

from torch import nn

from lowbit.blocks import LinearGroup
from lowbit.blocks.experts import UnfusedExperts
from lowbit.formats.dense import DenseLinear
from lowbit.methods.result import BlockResult
from lowbit.models.source import SourceModel
from lowbit.patterns import matches, matches_any


class Selection:
    """skip: patterns of linears that stay float. only: all others stay float; empty: none do.

    left_float: full names of the linears that stay float by choice. Raises ValueError for a pattern
    that matches nothing, or when nothing would be quantized.
    """

    def __init__(self, source: SourceModel, skip: Sequence[str], only: Sequence[str]) -> None:
        self.source = source
        self.skip = skip
        self.only = only
        self.linears = [
            f"{block}.{linear}"
            for block in source.block_names
            for group in source.groups(block)
            for linear in group.linears
        ]
        self.check_patterns("--skip", skip)
        self.check_patterns("--only", only)
        self.left_float = [name for name in self.linears if not self._chosen(name)]
        if len(self.left_float) == len(self.linears):
            raise ValueError("no linear would be quantized: all are skipped or left float")

    def check_patterns(self, what: str, patterns: Sequence[str]) -> None:
        """ValueError for a pattern that means no linear of this model: it is misspelt."""
        for pattern in patterns:
            if not any(matches(name, pattern) for name in self.linears):
                block = self.source.block_names[0]
                known = [name for name in self.linears if name.startswith(f"{block}.")][:8]
                raise ValueError(
                    f"{what} {pattern!r} matches no linear of this model; those of the first block "
                    f"are {', '.join(known)}"
                )

    def groups(self, block: str) -> tuple[LinearGroup, ...]:
        """The block's groups without what stays float."""
        found = []
        for group in self.source.groups(block):
            linears = tuple(n for n in group.linears if self._chosen(f"{block}.{n}"))
            if linears:
                found.append(LinearGroup(group.name, linears))
        return tuple(found)

    def _chosen(self, name: str) -> bool:
        wanted = not self.only or matches_any(name, self.only)
        return wanted and not matches_any(name, self.skip)


def pack_float_experts(block: nn.Module, result: BlockResult) -> None:
    """Stores an expert's float matrices densely where others of the same experts are packed.

    transformers would join float experts into one tensor, but not half of them.
    """
    for path, experts in block.named_modules():
        if not isinstance(experts, UnfusedExperts):
            continue
        linears = [name for name, m in experts.named_modules() if isinstance(m, nn.Linear)]
        names = [f"{path}.{name}" for name in linears]
        if not any(name in result.linears for name in names):
            continue
        for name in names:
            if name not in result.linears:
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear) and linear.bias is None
                weight = result.tensors.pop(f"{name}.weight", linear.weight)
                result.linears[name] = DenseLinear.from_weight(weight.detach(), None)
