"""What the backends named "triton" of rotated formats share: the transforms in one kernel."""

from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from lowbit.formats.incoherence import Rotation
from lowbit.formats.triton import TritonBackend, few_tokens
from lowbit.kernels.hadamard.factorization import Factorization
from lowbit.kernels.native.transform import odd_matrix
from lowbit.kernels.signs import kept_signs

if TYPE_CHECKING:
    from lowbit.formats.rotated import RotatedLinear

Layer = TypeVar("Layer", bound="RotatedLinear")


class RotatedTriton(TritonBackend[Layer]):
    """Computes the transforms in Triton too; very wide ones are left to torch."""

    def prepare(self, layer: Layer, x: Tensor) -> Tensor:
        """Returns the rotated input: float32 for a few tokens, else in the dtype of x."""
        owner = cast("RotatedLinear", layer.owner)
        if owner.is_offloaded():
            return layer.prepared(x)
        rotated = rotated_input(layer.rotation_in, x, owner.sign_in, owner.factor_in)
        return rotated if few_tokens(x.numel() // layer.in_features) else rotated.to(x.dtype)

    def finish(self, layer: Layer, y: Tensor) -> Tensor:
        """Computes S_out B_out y for each token. y: (tokens, out)"""
        rotation = layer.rotation_out
        if not _fits(rotation):
            return rotation.undo(y.float(), layer.sign_out, layer.factor_out)
        from lowbit.kernels.triton.transform import transform

        steps = _steps(rotation, layer.factor_out, y.device, inverse=False)
        return transform(y, *steps, after=_diagonal(rotation, layer.sign_out, y.device))


def rotated_input(
    rotation: Rotation, x: Tensor, signs: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """Computes `rotation.apply` in float32, in one kernel where it can: (..., in) -> (..., in)."""
    if not _fits(rotation):
        return rotation.apply(x.float(), signs, factor)
    from lowbit.kernels.triton.transform import transform

    steps = _steps(rotation, factor, x.device, inverse=True)
    return transform(x, *steps, before=_diagonal(rotation, signs, x.device))


def _fits(rotation: Rotation) -> bool:
    from lowbit.kernels.triton.transform import fits

    return fits(rotation.size, rotation.transform.power)


def _diagonal(rotation: Rotation, signs: Tensor | None, device: torch.device) -> Tensor | None:
    """Returns the diagonal of S on a device: (size,); None if there are no signs."""
    if signs is not None or rotation.seed is None:
        return signs
    return kept_signs(rotation.size, rotation.seed, device)


def _steps(
    rotation: Rotation, factor: Tensor | None, device: torch.device, *, inverse: bool
) -> tuple[int, Tensor | None, float]:
    """Returns the power of two of a transform, the matrix of its odd part, and its scale."""
    part = rotation.transform
    if factor is None:
        return part.power, _odd_matrix(part, inverse, device), part.scale
    return part.power, factor.T if inverse else factor, part.scale


@lru_cache(maxsize=64)
def _odd_matrix(part: Factorization, inverse: bool, device: torch.device) -> Tensor | None:
    matrix = odd_matrix(part, inverse)
    with torch.inference_mode(False):
        return None if matrix is None else matrix.to(device)
