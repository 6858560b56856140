"""What the backends named "cpu" of rotated formats share: the transforms in C."""

from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from lowbit.formats.incoherence import Rotation
from lowbit.formats.native import NativeBackend
from lowbit.kernels.native.transform import LARGEST, odd_matrix, transform

if TYPE_CHECKING:
    from lowbit.formats.rotated import RotatedLinear

Layer = TypeVar("Layer", bound="RotatedLinear")


class RotatedNative(NativeBackend[Layer]):
    """Computes the transforms in C too.

    Wide odd factors, and compiled models, leave the transforms to torch.
    """

    def prepare(self, layer: Layer, x: Tensor) -> Tensor:
        owner = cast("RotatedLinear", layer.owner)
        if not _in_c(layer.rotation_in) or owner.is_offloaded():
            return layer.prepared(x)
        return rotated_input(layer.rotation_in, x, owner.sign_in, owner.factor_in)

    def prepared_with(self, layer: Layer) -> tuple[Any, ...] | None:
        key = super().prepared_with(layer)
        # The owner stands for what it stores; what is drawn from seeds, the rotation describes.
        return None if key is None else (layer.rotation_in, *key[1:])

    def finish(self, layer: Layer, y: Tensor) -> Tensor:
        """Computes S_out B_out y for each token. y: (tokens, out) float32"""
        rotation = layer.rotation_out
        if not _in_c(rotation):
            return rotation.undo(y, layer.sign_out, layer.factor_out)
        signs = rotation.diagonal(layer.sign_out)
        return transform(y, *_steps(rotation, layer.factor_out, inverse=False), after=signs)


def rotated_input(
    rotation: Rotation, x: Tensor, signs: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """Computes `rotation.apply` in float32, in C where C can: (..., in) -> (..., in)."""
    if not _in_c(rotation):
        return rotation.apply(x.float(), signs, factor)
    rows = x.reshape(-1, rotation.size).float()
    steps = _steps(rotation, factor, inverse=True)
    return transform(rows, *steps, before=rotation.diagonal(signs)).view(x.shape)


def _in_c(rotation: Rotation) -> bool:
    """Whether C computes the transform."""
    known = rotation.size // rotation.transform.power <= LARGEST
    return known and not torch.compiler.is_compiling()


def _steps(
    rotation: Rotation, factor: Tensor | None, *, inverse: bool
) -> tuple[int, Tensor | None, float]:
    """Returns the power of two of a transform, the matrix of its odd part, and its scale."""
    part = rotation.transform
    if factor is None:
        return part.power, odd_matrix(part, inverse), part.scale
    return part.power, factor.T if inverse else factor, part.scale
