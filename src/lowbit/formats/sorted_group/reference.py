"""The reference of the sorted_group format: its arithmetic in plain torch.

The codes of inputs and weights are integers, held in a floating dtype. The products of a group and
their sums are integers too. Up to 2**24 they are exact in float32, in whatever order they are
added. A matrix product of floats therefore gives the exact integer result. On a CPU it is many
times as fast as torch's integer product, and it does not depend on the number of tokens that are
multiplied at once.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.backend import Backend
from lowbit.formats.tiles import WEIGHTS_ON_CPU, by_rows, product_dtype
from lowbit.formats.uniform.reference import groups_of
from lowbit.kernels.bits import unpack
from lowbit.kernels.straight_through import round_ste

if TYPE_CHECKING:
    from lowbit.formats.sorted_group import SortedGroupLinear

EXACT = 2**24  # float32 holds every integer up to here


class Reference(Backend["SortedGroupLinear"]):
    """Computes integer sums of a few rows at a time; dequantizes them if inputs are not rounded."""

    name = "reference"

    def multiply(
        self, layer: "SortedGroupLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        if layer.spec.activation is None:
            return self._by_weight(layer, prepared)
        return self._by_sums(layer, prepared)

    def _by_weight(self, layer: "SortedGroupLinear", prepared: Tensor) -> Tensor:
        spec, x = layer.spec, prepared.to(product_dtype(prepared))

        def product(weight: Tensor, packed: Tensor, scale: Tensor, *salient: Tensor) -> Tensor:
            kept = weight[:, : spec.kept].copy_(signed_codes(packed, spec.bits, spec.kept))
            for group, unit in groups_of(kept, spec.group_size, scale):
                group.mul_(unit)
            if salient:
                weight[:, spec.kept :] = salient_weight(*salient)
            return functional.linear(x, weight.to(x.dtype))

        sources = (layer.packed, layer.scale.float(), *layer.salient_tensors())
        return by_rows(x, (layer.out_features, layer.in_features), product, sources)

    def _by_sums(self, layer: "SortedGroupLinear", prepared: Tensor) -> Tensor:
        spec, (codes, scale, salient) = layer.spec, layer.split(prepared)
        assert spec.activation is not None
        size = min(spec.group_size or spec.kept, spec.kept)
        exact = exact_dtype(spec.bits, spec.activation.bits, size)
        inputs, scales = codes.to(exact), layer.scale.to(scale.dtype)
        # With a few tokens, the sums of all rows are added up at once, because one addition for
        # each group and tile would take longer than the products.
        few = len(codes) * layer.groups * layer.out_features <= WEIGHTS_ON_CPU

        def product(weight: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
            weight.copy_(signed_codes(packed, spec.bits, spec.kept))
            sums = group_sums(inputs, weight, spec.group_size)
            return sums.flatten(0, 1) if few else total(sums, scale, scales)

        shape = layer.out_features, spec.kept
        y = by_rows(codes, shape, product, (layer.packed, scales), exact)
        y = total(y.view(layer.groups, len(codes), -1), scale, scales) if few else y
        return y + self._salient_product(layer, salient) if spec.salient else y

    def _salient_product(self, layer: "SortedGroupLinear", x: Tensor) -> Tensor:
        def product(weight: Tensor, *salient: Tensor) -> Tensor:
            return functional.linear(x, weight.copy_(salient_weight(*salient)))

        shape = layer.out_features, x.shape[1]
        return by_rows(x, shape, product, layer.salient_tensors(), x.dtype)


def signed_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Returns codes minus 2**(bits - 1). packed: (rows, bytes) uint8 -> (rows, count) int8"""
    return unpack(packed, bits, count).sub_(2 ** (bits - 1)).view(torch.int8)


def salient_weight(salient: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns the salient weights in float32: (rows, salient).

    salient: (rows, salient), weights, or codes if there is a scale.
    scale: (rows,).
    """
    return salient.float() if scale is None else salient.float() * scale.float().unsqueeze(1)


def top_code(bits: int) -> int:
    """Returns the largest code of an input: 7 at 4 bits. -8 is unused, so that 0 is the middle."""
    return 2 ** (bits - 1) - 1


def quantize_input(x: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Rounds each group of each token with a scale of its own, ties to even.

    The scale is the largest |x| of the group divided by the top code. Gradients pass through the
    rounding.

    x: (tokens, k) of a floating dtype.
    bits: width of a code.

    Returns codes (tokens, k) and scales (tokens, groups), in the dtype of x.
    """
    top = top_code(bits)
    codes, scales = [], []
    for (group,) in groups_of(x, group_size):
        step = group.abs().amax(-1) / top
        # A group of zeros is divided by infinity, because a division by 0 would give NaN.
        ratios = group / step.masked_fill(step == 0, torch.inf).unsqueeze(-1)
        codes.append(round_ste(ratios).clamp(-top, top).flatten(1))
        scales.append(step)
    return torch.cat(codes, 1), torch.cat(scales, 1)


def scaled(codes: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    """Returns scale * codes. codes: (rows, k), scale: (rows, groups) -> (rows, k)"""
    values = codes.clone()
    for group, unit in groups_of(values, group_size, scale):
        group.mul_(unit)
    return values


def exact_dtype(bits: int, input_bits: int, size: int) -> torch.dtype:
    """Returns the dtype in which the sum of a group's products is exact: float32 or float64.

    bits, input_bits: widths of the codes of weights and inputs.
    size: weights of a group.
    """
    return (
        torch.float32 if 2 ** (bits - 1) * top_code(input_bits) * size <= EXACT else torch.float64
    )


def group_sums(inputs: Tensor, weights: Tensor, group_size: int | None) -> Tensor:
    """Multiplies codes of inputs and weights, and sums the products of each group.

    inputs: (tokens, k), weights: (rows, k), both in the dtype of `exact_dtype`.

    Returns (groups, tokens, rows).
    """
    by_group = zip(groups_of(inputs, group_size), groups_of(weights, group_size), strict=True)
    sums = [
        torch.bmm(codes.transpose(0, 1), rows.permute(1, 2, 0)) for (codes,), (rows,) in by_group
    ]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def total(sums: Tensor, scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Returns the sum over the groups of input scale * weight scale * sum.

    sums: (groups, tokens, rows), overwritten.
    scale: (tokens, groups), scales of the inputs.
    weight_scale: (rows, groups).

    Returns (tokens, rows) in the dtype of the scales.
    """
    sums = (
        sums.to(scale.dtype)
        .mul_(scale.T.unsqueeze(2))
        .mul_(weight_scale.T.contiguous().unsqueeze(1))
    )
    added = torch.zeros_like(sums[0])
    for group in sums.unbind():  # one by one: a fused sum would depend on the position of a token
        added.add_(group)
    return added
