"""Incoherence: random signs and an orthogonal transform on each side of a weight.

    W' = B_out.T S_out W S_in B_in        H' = B_in.T S_in H S_in B_in
    W  = S_out B_out W' B_in.T S_in       W x = S_out B_out W' (B_in.T S_in x)

with W: (out, in) a weight, H: (in, in) the Hessian of its inputs and S the diagonal matrix of
signs, so that tr(W H W.T) = tr(W' H' W'.T). The entries of W' look as if they were drawn from one
Gaussian. QuIP# (arXiv 2402.04396), section 3.

Signs come from a seed, the same ones everywhere, or there are none (a neighbour in the model has
them in its weight). Sign i is 1 - 2 * bit i of the SHAKE-256 (FIPS 202) of "lowbit signs SEED" in
ASCII, SEED in decimal; bit i of the digest is bit i % 8 of byte i // 8, low bits first.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from lowbit.kernels import hadamard
from lowbit.kernels.bits import unpack

Stored = Literal["float16", "float32"]  # the dtype of a factor that is stored with the weight
LARGEST_FACTOR = 2**14  # 1 GiB in float32


@dataclass(frozen=True)
class Rotation:
    """One side of a weight, made by `rotation`: B, and the seed of the signs; None: no signs.

    Where the signs were trained they are passed in, and `apply` and `undo` need not be inverse.
    Where `stored` is a dtype, `transform` is H_p alone and M, the (order, order) factor of
    B = (M (x) I_p)(I_K (x) H_p), is passed in as well.
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
        """B.T S x for every vector x.  x: (..., size)  signs: (size,)  ->  (..., size)"""
        signed = self._signed(x, signs)
        if self.stored is None:
            return self.transform.inverse(signed)
        return self._factored(self.transform.inverse(self._split(signed)), factor, inverse=True)

    def undo(self, x: Tensor, signs: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """S B x for every vector x.  x: (..., size)  signs: (size,)  ->  (..., size)"""
        if self.stored is None:
            return self._signed(self.transform(x), signs)
        made = self._factored(self.transform(self._split(x)), factor, inverse=False)
        return self._signed(made, signs)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.order, self.transform.n))

    def _factored(self, x: Tensor, factor: Tensor | None, inverse: bool) -> Tensor:
        """M or M.T along the last dimension but one.  x: (..., order, p)  ->  (..., size)"""
        assert factor is not None
        return torch.matmul((factor.T if inverse else factor).to(x), x).flatten(-2)

    def signs(self, device: torch.device | str = "cpu") -> Tensor:
        """The diagonal of S, drawn from the seed: (size,) float32"""
        if self.seed is None:
            return torch.ones(self.size, device=device)
        return draw_signs(self.size, self.seed, torch.device(device))

    def _signed(self, x: Tensor, signs: Tensor | None) -> Tensor:
        if signs is None and self.seed is None:
            return x
        if signs is None and torch.compiler.is_compiling():
            signs = self.signs(x.device)
        elif signs is None:  # without a copy, and without the 0.2 ms that calling an op costs
            assert self.seed is not None
            signs = _signs(self.size, self.seed, x.device)
        return x * signs.to(x)


def rotation(size: int, seed: int | None, kind: str = "auto") -> Rotation:
    """One side of a weight, `size` wide. The seed is also that of a random transform, None is 0.

    kind: auto, hadamard, hartley or random, as `lowbit.kernels.hadamard.orthogonal` takes it; or
    the dtype of a stored factor for the odd part of size, which must not be 1.
    """
    if kind in get_args(Stored):
        power = size & -size
        if not 1 < size // power <= LARGEST_FACTOR:
            raise ValueError(
                f"the odd part of {size} is {size // power}: a factor is stored for those above 1 "
                f"and up to {LARGEST_FACTOR}"
            )
        return Rotation(hadamard.orthogonal(power), seed, cast(Stored, kind), size // power)
    return Rotation(hadamard.orthogonal(size, kind, seed or 0), seed)


def rotate_weight(weight: Tensor, rotation_in: Rotation, rotation_out: Rotation) -> Tensor:
    """W to W'.  weight: (out, in)  ->  (out, in), same dtype"""
    return rotation_out.apply(rotation_in.apply(weight).T).T


def restore_weight(
    rotated: Tensor,
    rotation_in: Rotation,
    rotation_out: Rotation,
    signs: tuple[Tensor | None, Tensor | None] = (None, None),
    factors: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """W' to W, the inverse of `rotate_weight`; signs: of both sides, where they were trained, and
    factors, where they are stored.

    rotated: (out, in)  ->  (out, in), same dtype
    """
    half = rotation_in.undo(rotated, signs[0], factors[0])
    return rotation_out.undo(half.T, signs[1], factors[1]).T


def rotate_hessian(hessian: Tensor, rotation_in: Rotation) -> Tensor:
    """H to H'.  hessian: (in, in)  ->  (in, in), same dtype"""
    return rotation_in.apply(rotation_in.apply(hessian).T).T


@lru_cache(maxsize=1024)  # 16 MB at a width of 4096
def _signs(size: int, seed: int, device: torch.device) -> Tensor:
    digest = hashlib.shake_256(f"lowbit signs {seed}".encode()).digest(-(-size // 8))
    with torch.inference_mode(False), torch.device("cpu"):
        drawn = unpack(torch.frombuffer(bytearray(digest), dtype=torch.uint8), 1, size)
        return (1 - 2 * drawn.float()).to(device)


# An op, so that torch.compile need not look inside and trace a hash.
@torch.library.custom_op("lowbit::draw_signs", mutates_args=())
def draw_signs(size: int, seed: int, device: torch.device) -> Tensor:
    """(size,) float32 of 1 and -1"""
    return _signs(size, seed, device).clone()


@draw_signs.register_fake
def _(size: int, seed: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=device)
