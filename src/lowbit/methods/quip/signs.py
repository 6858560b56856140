"""Random signs inside a block's own tensors, so that they cost nothing at run time.

A fold by s, a vector of 1 and -1, leaves the block's output as it is, bit for bit: its source puts
out s * x, and its readers have W diag(s) for W. That is the S_in of incoherence processing (QuIP#,
arXiv 2402.04396, section 3) for the readers, and S_out for a source that is itself quantized.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from lowbit.blocks import Fold
from lowbit.blocks.folding import Tensors, apply_fold


@dataclass(frozen=True)
class Merged:
    """tensors: the block's, with signs inside. columns: by reader, (in,), what multiplied its input
    columns. rows: linears of which every output row was multiplied.
    """

    tensors: Tensors
    columns: dict[str, Tensor]
    rows: frozenset[str]


def merge_signs(tensors: Tensors, folds: Iterable[Fold], draw: Callable[[int], Tensor]) -> Merged:
    """All folds of a channel into its readers' inputs, each by draw(its size).

    Not "rotary": it multiplies rows of queries and keys, whose columns carry the norm's signs. A
    "gated" source is multiplied with its gate, so that signs pass.
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
