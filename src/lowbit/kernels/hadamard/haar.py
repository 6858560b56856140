"""Random orthogonal matrices from a seed, uniform over all orthogonal matrices (Haar measure)."""

import torch
from torch import Tensor


def haar(order: int, seed: int) -> Tensor:
    """Returns the Q of the QR decomposition of a Gaussian matrix: (order, order) float64.

    The signs are chosen so that the diagonal of R is positive. Source: F. Mezzadri, How to generate
    random matrices from the classical compact groups (2007), section 5.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sgn()).contiguous()
