"""Random orthogonal matrices, uniform over the group, from a seed."""

import torch
from torch import Tensor


def haar(order: int, seed: int) -> Tensor:
    """The Q of a Gaussian matrix whose R has a positive diagonal.  ->  (order, order) float64

    F. Mezzadri, How to generate random matrices from the classical compact groups (2007), sec. 5.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sgn()).contiguous()
