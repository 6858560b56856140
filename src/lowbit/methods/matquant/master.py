"""A block with 8-bit codes, from which the block at any width can be computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lowbit.blocks.folding import Tensors
from lowbit.methods.matquant.slices import fake_slice
from lowbit.solvers.rounding import Grid, fake_quantize


@dataclass(frozen=True)
class Master:
    """A block with 8-bit codes.

    tensors: the block's float tensors after folding.
    grids: the 8-bit grid of each linear, by name.
    codes: the 8-bit codes of each linear that is sliced, by name; see `master_codes`. The others
        keep 8 bits.
    extra_precision: whether the slices of a linear have one more level, by name.
    own: the grids of slices that have their own, by name and width.
    """

    tensors: Tensors
    grids: Mapping[str, Grid]
    codes: Mapping[str, Tensor]
    extra_precision: Mapping[str, bool]
    own: Mapping[tuple[str, int], Grid] = field(default_factory=dict)

    def parts(self) -> Tensors:
        """Returns all tensors that gradients flow through, by name."""
        scales = {f"{name} scale": grid.scale for name, grid in self.grids.items()}
        zeros = {f"{name} zero": grid.zero for name, grid in self.grids.items()}
        return self.tensors | scales | {n: zero for n, zero in zeros.items() if zero is not None}

    def at(self, width: int, parts: Mapping[str, Tensor]) -> Tensors:
        """Returns the tensors of the block at one width.

        parts: what `parts` returned, or a copy of it to differentiate by.
        """
        tensors = {name: parts[name] for name in self.tensors}
        for name, grid in self.grids.items():
            zero = None if grid.zero is None else parts[f"{name} zero"]
            grid = replace(grid, scale=parts[f"{name} scale"], zero=zero)
            grid = self.own.get((name, width), grid)
            weight = parts[f"{name}.weight"]
            if name in self.codes:
                extra = self.extra_precision[name]
                rounded = fake_slice(weight, grid, self.codes[name], width, extra)
            else:
                rounded = fake_quantize(weight, grid)
            tensors[f"{name}.weight"] = rounded
        return tensors
