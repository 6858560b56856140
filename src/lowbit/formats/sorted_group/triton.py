"""Multiplies by codes of the sorted_group format with Triton's kernels."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.sorted_group.limits import multipliable
from lowbit.formats.sorted_group.reference import salient_weight
from lowbit.formats.triton import (
    TritonBackend,
    few_tokens,
    multiply_stream,
    multiply_written,
    stream_sources,
    stream_writer,
)

if TYPE_CHECKING:
    from lowbit.formats.sorted_group import SortedGroupLinear
    from lowbit.kernels.triton.stream import Stream


class Triton(TritonBackend["SortedGroupLinear"]):
    """Rounds inputs as the reference does, and multiplies integers in int8."""

    def supports(
        self,
        layer: "SortedGroupLinear",
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        gradients: bool,
    ) -> bool:
        fits = multipliable(layer)
        return fits and super().supports(layer, device, dtype, tokens, gradients)

    def prepare(self, layer: "SortedGroupLinear", x: Tensor) -> Tensor:
        return layer.reordered(x)  # the kernel rounds it

    def multiply(
        self, layer: "SortedGroupLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        spec = layer.spec
        if spec.activation is not None:
            from lowbit.kernels.triton.group_sums import Codes, multiply

            size = spec.group_size or spec.kept
            beside = layer.salient, layer.salient_scale
            weight = Codes(layer.packed, spec.kept, spec.bits, layer.scale, size, *beside)
            return multiply(prepared, weight, spec.activation.bits)
        kept = _stream(layer)
        if few_tokens(len(prepared)):
            y = multiply_stream(prepared[:, : spec.kept], kept)
            if not spec.salient:
                return y
            salient = salient_weight(*layer.salient_tensors())
            return y + functional.linear(prepared[:, spec.kept :].float(), salient)
        write_kept, own = stream_writer(kept), stream_sources(kept)

        def write(into: Tensor, *rows: Tensor) -> None:
            write_kept(into[:, : spec.kept], *rows[: len(own)])
            if spec.salient:
                into[:, spec.kept :] = salient_weight(*rows[len(own) :])

        sources = [*own, *layer.salient_tensors()]
        return multiply_written(prepared, layer.out_features, sources, write)


def _stream(layer: "SortedGroupLinear") -> "Stream":
    from lowbit.kernels.triton.stream import Stream

    spec = layer.spec
    size = spec.group_size or spec.kept
    middle = 2 ** (spec.bits - 1)
    return Stream(layer.packed, spec.kept, spec.bits, layer.scale, size, middle=middle)
