"""The definition of the sorted_group format's arithmetic, in torch.

Codes of inputs and weights are integers in a floating dtype. Products of theirs, summed over a
group, are integers too, and those below 2**24 are exact in float32 whatever the order of additions:
a matrix product of floats is then the integer product, many times as fast as torch's own on a CPU,
and does not depend on how many tokens are multiplied at once.
"""

import torch
from torch import Tensor

from lowbit.formats.uniform.reference import groups_of
from lowbit.kernels.straight_through import round_ste

EXACT = 2**24  # float32 holds every integer up to here


def top_code(bits: int) -> int:
    """The largest code of an input: 7 at 4 bits. -8 is not used, so that 0 is the middle."""
    return 2 ** (bits - 1) - 1


def quantize_input(x: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Each token's groups on their own grids: scale = largest |x| / top code, ties to even.

    x: (m, k) floating  ->  codes (m, k), scale (m, groups), in the dtype of x. Gradients pass
    through the rounding.
    """
    top = top_code(bits)
    codes, scales = [], []
    for group, _ in groups_of(x, group_size):
        step = group.abs().amax(-1) / top
        # A division by infinity is the 0 that a group of zeros should get, and never NaN.
        ratios = group / step.masked_fill(step == 0, torch.inf).unsqueeze(-1)
        codes.append(round_ste(ratios).clamp(-top, top).flatten(1))
        scales.append(step)
    return torch.cat(codes, 1), torch.cat(scales, 1)


def scaled(codes: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    """scale * codes.  codes: (rows, k)  scale: (rows, groups)  ->  (rows, k)"""
    values = codes.clone()
    for group, columns in groups_of(values, group_size):
        group.mul_(scale[:, columns, None])
    return values


def exact_dtype(bits: int, input_bits: int, size: int) -> torch.dtype:
    """In which the products of a group of `size` weights are exact; float64 above float32's."""
    return (
        torch.float32 if 2 ** (bits - 1) * top_code(input_bits) * size <= EXACT else torch.float64
    )


def multiply(
    inputs: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    group_size: int | None,
    exact: torch.dtype,
) -> Tensor:
    """sum over groups of (input scale * weight scale) * (input codes . weight codes)

    inputs: codes (m, k) and scale (m, groups)  weights: codes (n, k) and scale (n, groups)
    exact: from `exact_dtype`  ->  (m, n) in the dtype of the inputs
    """
    codes, scale = inputs
    weight_scale = weights[1].to(scale.dtype)
    total = codes.new_zeros(len(codes), len(weights[0]))
    by_group = zip(
        groups_of(codes.to(exact), group_size),
        groups_of(weights[0].to(exact), group_size),
        strict=True,
    )
    with torch.autocast(codes.device.type, enabled=False):  # which would round the sums
        for (ours, columns), (theirs, _) in by_group:
            for i, group in enumerate(range(columns.start, columns.stop)):
                sums = (ours[:, i] @ theirs[:, i].T).to(total.dtype)
                # Rounded step by step: fused ones would depend on where in memory a token is.
                total.add_(sums.mul_(scale[:, group, None]).mul_(weight_scale[:, group]))
    return total
