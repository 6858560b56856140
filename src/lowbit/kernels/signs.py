"""Random signs, drawn from a seed, the same ones on every machine.

Sign i is 1 - 2 * bit i of the SHAKE-256 (FIPS 202) of "lowbit signs SEED" in ASCII, with SEED in
decimal. Bit i of the digest is bit i % 8 of byte i // 8, low bits first.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.kernels.bits import unpack


@lru_cache(maxsize=1024)  # 16 MB at a width of 4096
def kept_signs(size: int, seed: int, device: torch.device) -> Tensor:
    """Returns signs as `draw_signs` draws them, always the same tensor; do not modify it."""
    digest = hashlib.shake_256(f"lowbit signs {seed}".encode()).digest(-(-size // 8))
    with torch.inference_mode(False), torch.device("cpu"):
        drawn = unpack(torch.frombuffer(bytearray(digest), dtype=torch.uint8), 1, size)
        return (1 - 2 * drawn.float()).to(device)


# A custom op, so that torch.compile does not trace the hash function.
@torch.library.custom_op("lowbit::draw_signs", mutates_args=())
def draw_signs(size: int, seed: int, device: torch.device) -> Tensor:
    """Draws signs from a seed: (size,) float32 of 1 and -1."""
    return kept_signs(size, seed, device).clone()


@draw_signs.register_fake
def _(size: int, seed: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=device)


def signs_for(x: Tensor, seed: int) -> Tensor:
    """Returns the signs for the last dimension of x, in its dtype; do not modify them."""
    if torch.compiler.is_compiling():
        return draw_signs(x.shape[-1], seed, x.device).to(x)
    # Saves a copy, and the 0.2 ms of calling the custom op.
    return kept_signs(x.shape[-1], seed, x.device).to(x)
