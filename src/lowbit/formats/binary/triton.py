"""Multiplies by signs and salient codes of the binary format with Triton's kernels."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.formats.triton import (
    TritonBackend,
    few_tokens,
    multiply_written,
    stream_sources,
    stream_writer,
)

if TYPE_CHECKING:
    from lowbit.formats.binary import BinaryLinear
    from lowbit.kernels.triton.stream import Stream


class Triton(TritonBackend["BinaryLinear"]):
    """The plain channels are codes of 1 bit, and the salient ones codes of 4 bits.

    plain:  column_scale * (row_mean + row_scale - 2 * row_scale * bit)
    """

    def repack(self, layer: "BinaryLinear") -> dict[str, Tensor]:
        scale = layer.row_scale.float().unsqueeze(1)
        mean = torch.zeros_like(scale) if layer.row_mean is None else layer.row_mean.unsqueeze(1)
        made = {"scale": -2 * scale, "added": scale + mean.float()}
        return made | ({"zero": layer.zeros().unsqueeze(1)} if layer.spec.salient else {})

    def multiply(
        self, layer: "BinaryLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        from lowbit.kernels.triton import stream
        from lowbit.kernels.triton.launch import total

        weights, plain = _streams(layer, packed), layer.plain
        if few_tokens(len(prepared)):
            inputs = prepared[:, :plain], prepared[:, plain:]
            parts = [stream.few(x, w) for x, w in zip(inputs, weights, strict=False)]
            return total(torch.cat(parts))
        writers = [stream_writer(weight) for weight in weights]
        of_plain = stream_sources(weights[0])
        sources = [tensor for weight in weights for tensor in stream_sources(weight)]

        def write(into: Tensor, *rows: Tensor) -> None:
            writers[0](into[:, :plain], *rows[: len(of_plain)])
            if len(writers) > 1:
                writers[1](into[:, plain:], *rows[len(of_plain) :])

        return multiply_written(prepared, layer.out_features, sources, write)


def _streams(layer: "BinaryLinear", packed: dict[str, Tensor]) -> "list[Stream]":
    """Returns the weights of the plain channels, and of the salient ones if there are any."""
    from lowbit.kernels.triton.stream import Stream

    plain = Stream(
        layer.sign,
        layer.plain,
        1,
        packed["scale"],
        layer.plain,
        added=packed["added"],
        columns=layer.column_scale,
    )
    count = layer.spec.salient
    if not count:
        return [plain]
    assert layer.salient is not None and layer.salient_scale is not None
    scale = layer.salient_scale.unsqueeze(1)
    return [plain, Stream(layer.salient, count, 4, scale, count, zero=packed["zero"])]
