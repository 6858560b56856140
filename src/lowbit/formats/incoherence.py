"""Incoherence: random signs and an orthogonal transform on each side of a weight.

    W' = B_out.T S_out W S_in B_in        H' = B_in.T S_in H S_in B_in
    W  = S_out B_out W' B_in.T S_in       W x = S_out B_out W' (B_in.T S_in x)

W: (out, in) is a weight, H: (in, in) the Hessian of its inputs, S a diagonal matrix of signs and B
orthogonal, so that tr(W H W.T) = tr(W' H' W'.T). The entries of W' look as if they were drawn from
one Gaussian. Source: QuIP# (arXiv 2402.04396), section 3.

Signs are drawn from a seed, as `kernels/signs.py` describes. A side can also be without signs, if
they are multiplied into another weight of the model.
"""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from lowbit.kernels import hadamard
from lowbit.kernels.signs import draw_signs, kept_signs, signs_for

Stored = Literal["float16", "float32"]  # the dtype of a factor that is stored with the weight
LARGEST_FACTOR = 2**14  # 1 GiB in float32


@dataclass(frozen=True)
class Rotation:
    """Signs S and transform B of one side of a weight; made by `rotation`.

    Trained signs are passed to `apply` and `undo`, which then need not be inverse to each other. If
    `stored` is a dtype, the factor M of B = (M (x) I_p)(I_K (x) H_p) is passed to them too.

    transform: B, or H_p only if `stored` is a dtype.
    seed: seed of the signs; None: no signs.
    stored: dtype of M; None: B has no stored factor.
    order: rows and columns of M.
    """

    transform: hadamard.Transform
    seed: int | None
    stored: Stored | None = None
    order: int = 1

    @property
    def size(self) -> int:
        return self.order * self.transform.n

    @property
    def kind(self) -> hadamard.Kind | Stored:
        return self.stored or self.transform.kind

    def apply(self, x: Tensor, signs: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """Computes B.T S x for every vector x.

        x: (..., size).
        signs: trained signs, (size,); None: those of the seed.
        factor: M, (order, order); only for a rotation with `stored`.

        Returns (..., size).
        """
        signed = self._signed(x, signs)
        if self.stored is None:
            return self.transform.inverse(signed)
        return self._factored(self.transform.inverse(self._split(signed)), factor, inverse=True)

    def undo(self, x: Tensor, signs: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """Computes S B x for every vector x; arguments and result as for `apply`."""
        if self.stored is None:
            return self._signed(self.transform(x), signs)
        made = self._factored(self.transform(self._split(x)), factor, inverse=False)
        return self._signed(made, signs)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.order, self.transform.n))

    def _factored(self, x: Tensor, factor: Tensor | None, inverse: bool) -> Tensor:
        """Multiplies by M or M.T along the dimension `order`. (..., order, p) -> (..., size)"""
        assert factor is not None
        return torch.matmul((factor.T if inverse else factor).to(x), x).flatten(-2)

    def signs(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns the diagonal of S, drawn from the seed: (size,) float32."""
        if self.seed is None:
            return torch.ones(self.size, device=device)
        return draw_signs(self.size, self.seed, torch.device(device))

    def diagonal(self, signs: Tensor | None) -> Tensor | None:
        """Returns the diagonal of S on the CPU: (size,); None if there are no signs.

        signs: trained signs; None: those of the seed. Do not modify the result.
        """
        if signs is not None or self.seed is None:
            return signs
        return kept_signs(self.size, self.seed, torch.device("cpu"))

    def _signed(self, x: Tensor, signs: Tensor | None) -> Tensor:
        if signs is None and self.seed is None:
            return x
        if signs is None:
            assert self.seed is not None
            return x * signs_for(x, self.seed)
        return x * signs.to(x)


def rotation(size: int, seed: int | None, kind: str = "auto") -> Rotation:
    """Returns signs and transform of one side of a weight.

    size: features of that side.
    seed: seed of the signs, and of a random transform; None: no signs, and 0 for the transform.
    kind: auto, hadamard, hartley or random, as for `lowbit.kernels.hadamard.orthogonal`; or
        "float16" or "float32", the dtype of a stored factor M for the odd part of size.

    Raises ValueError for a stored factor if the odd part of size is 1 or above LARGEST_FACTOR.
    """
    if kind in get_args(Stored):
        power = size & -size
        if not 1 < size // power <= LARGEST_FACTOR:
            raise ValueError(
                f"the odd part of {size} is {size // power}: a factor can only be stored for odd "
                f"parts above 1 and up to {LARGEST_FACTOR}"
            )
        return Rotation(hadamard.orthogonal(power), seed, cast(Stored, kind), size // power)
    return Rotation(hadamard.orthogonal(size, kind, seed or 0), seed)


def rotate_weight(weight: Tensor, rotation_in: Rotation, rotation_out: Rotation) -> Tensor:
    """Returns W' of a weight W: (out, in) -> (out, in), same dtype."""
    return rotation_out.apply(rotation_in.apply(weight).T).T


def restore_weight(
    rotated: Tensor,
    rotation_in: Rotation,
    rotation_out: Rotation,
    signs: tuple[Tensor | None, Tensor | None] = (None, None),
    factors: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Returns W of a rotated weight W'; undoes `rotate_weight`.

    rotated: (out, in).
    signs: trained signs of the input and the output side; None: those of the seed.
    factors: stored factors of the input and the output side.

    Returns (out, in), same dtype.
    """
    half = rotation_in.undo(rotated, signs[0], factors[0])
    return rotation_out.undo(half.T, signs[1], factors[1]).T


def rotate_hessian(hessian: Tensor, rotation_in: Rotation) -> Tensor:
    """Returns H' of a Hessian H: (in, in) -> (in, in), same dtype."""
    return rotation_in.apply(rotation_in.apply(hessian).T).T
