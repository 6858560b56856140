"""The inputs of products with compiled kernels, as the kernels round them, computed by torch."""

import torch
from torch import Tensor

from lowbit.kernels.native import Part

PIECE = 512  # inputs that are rounded with one step, at most


def rounded_inputs(x: Tensor, parts: list[Part]) -> Tensor:
    """Returns the inputs (tokens, inputs) of a product as its parts round them, in float64.

    Inputs of parts that round as their format's reference does are returned as they are.
    """
    seen = x.double()
    for part in parts:
        if part.rounding.kind != "pieces" or part.codes is None:
            continue
        own = slice(part.first, part.first + part.inputs)
        columns = 1 if part.columns is None else part.columns.float()
        seen[:, own] = _by_pieces(x[:, own].float() * columns, part) / columns
    return seen


def _by_pieces(x: Tensor, part: Part) -> Tensor:
    seen, size = x.double(), min(part.group_size, part.inputs)
    for start in range(0, part.inputs, size):
        for begin in range(start, min(start + size, part.inputs), PIECE):
            piece = slice(begin, min(begin + PIECE, start + size, part.inputs))
            step = x[:, piece].abs().amax(1, keepdim=True) / part.rounding.top
            ratio = x[:, piece] / step.masked_fill(step == 0, torch.inf)
            seen[:, piece] = ratio.round().double() * step.double()
    return seen
