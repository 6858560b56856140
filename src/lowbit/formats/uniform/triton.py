"""Multiplies by codes of the uniform format with Triton's kernels."""

from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.formats.rotated_triton import rotated_input
from lowbit.formats.triton import TritonBackend, few_tokens, multiply_stream

if TYPE_CHECKING:
    from lowbit.formats.uniform import UniformLinear


class Triton(TritonBackend["UniformLinear"]):
    """Reads the codes as they are stored; zero points are unpacked to bytes."""

    def repack(self, layer: "UniformLinear") -> dict[str, Tensor]:
        return {} if layer.zero is None else {"zero": layer.zeros()}

    def prepare(self, layer: "UniformLinear", x: Tensor) -> Tensor:
        """Rotates and rounds the input; what is rotated is float32 for a few tokens."""
        given = x if layer.rotation is None else rotated_input(layer.rotation, x)
        if layer.activation is not None:
            from lowbit.kernels.triton.round_tokens import round_tokens

            given = round_tokens(given, layer.activation.bits, layer.activation.symmetric)
        return given if few_tokens(x.numel() // layer.in_features) else given.to(x.dtype)

    def multiply(
        self, layer: "UniformLinear", packed: dict[str, Tensor], prepared: Tensor
    ) -> Tensor:
        from lowbit.kernels.triton.stream import Stream

        spec = layer.spec
        weight = Stream(
            layer.packed,
            layer.in_features,
            spec.bits,
            layer.scale,
            spec.group_size or layer.in_features,
            zero=packed.get("zero"),
            middle=2 ** (spec.bits - 1),
            zero_unit=2.0**-spec.zero_shift,
        )
        return multiply_stream(prepared, weight)
