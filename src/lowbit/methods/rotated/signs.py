"""Merge random signs into the tensors of a block, so that they cost nothing at run time.

A fold by s, a vector of 1 and -1, does not change the block's output by a single bit: its source
outputs s * x, and its readers have the weight W diag(s). For the readers, s is the sign vector S_in
of incoherence processing (QuIP#, arXiv 2402.04396, section 3); for a source that is quantized too,
it is S_out.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.blocks import Fold
from lowbit.blocks.folding import Tensors, apply_fold


@dataclass(frozen=True)
class Merged:
    """The tensors of a block after merging signs.

    tensors: the block's tensors by name, with signs.
    columns: (in,) each, the signs of the input columns of a linear, by the linear's name.
    rows: the linears all of whose output rows were multiplied by signs.
    """

    tensors: Tensors
    columns: dict[str, Tensor]
    rows: frozenset[str]

    def row_signs(self, linear: str, before: Tensor) -> Tensor:
        """Returns the signs by which the rows of a linear were multiplied, (out,).

        before: (out, in), its weight without signs.
        """
        columns = self.columns.get(linear, before.new_ones(before.shape[1]))
        same = (self.tensors[f"{linear}.weight"] * before * columns).sum(1)
        return torch.where(same < 0, -1.0, 1.0)


def merge_signs(tensors: Tensors, folds: Iterable[Fold], draw: Callable[[int], Tensor]) -> Merged:
    """Applies random signs through all folds but rotary ones.

    A rotary fold multiplies rows of queries and keys, not the columns of a reader. A "gated" source
    can have signs because its output is only multiplied by the gate's.

    tensors: the block's tensors by name; they are not changed.
    draw: returns n random signs, given n.
    """
    columns: dict[str, Tensor] = {}
    rows: set[str] = set()
    for fold in folds:
        if fold.kind == "rotary":
            continue
        signs = draw(fold.size)
        tensors = apply_fold(tensors, fold, signs)
        of_columns = signs if fold.reader_channels is None else signs[fold.reader_channels]
        columns |= dict.fromkeys(fold.readers, of_columns)
        if fold.kind != "norm" and fold.source_rows is None:
            rows.add(fold.source)
    return Merged(tensors, columns, frozenset(rows))
