"""Products with packed bits without unpacking them: the sums that a byte can stand for are tabled.

For every byte of a row there are 256 possible sums of the inputs that it meets; a table of all of
them takes as long as a few rows, and then each byte costs one look-up (T-MAC, arXiv 2407.00088).
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.binary.reference import Reference
from lowbit.kernels.bits import unpack

if TYPE_CHECKING:
    from lowbit.formats.binary import BinaryLinear

# For more tokens, bits are unpacked once. On one thread of a CPU looking up takes, for each token,
# 0.15 (4096 x 4096), 0.3 (2048 x 2048) or all (1024 x 1024) of the time of unpacking, which hardly
# grows up to 8.
MOST_LOOKED_UP = 4


class Lookup(Reference):
    """Looks the sums up instead of unpacking the bits, for a few tokens."""

    name = "lookup"

    def supports(
        self,
        layer: "BinaryLinear",
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        gradients: bool,
    ) -> bool:
        return tokens <= MOST_LOOKED_UP and dtype != torch.float64

    def signed_sums(self, packed: Tensor, x: Tensor) -> Tensor:
        return signed_sums(packed, x)

    def weighted_sums(self, packed: Tensor, x: Tensor) -> Tensor:
        return weighted_sums(packed, x)


def signed_sums(packed: Tensor, x: Tensor) -> Tensor:
    """Sums of inputs, those minus whose bit is set.

    packed: (out, ceil(n / 8)) uint8, a bit for each input  x: (tokens, n) float32
    -> (tokens, out) float32
    """
    return _sums(packed, x, 1)


def weighted_sums(packed: Tensor, x: Tensor) -> Tensor:
    """Sums of inputs times their codes of 4 bits.

    packed: (out, ceil(n / 2)) uint8  x: (tokens, n) float32  ->  (tokens, out) float32
    """
    return _sums(packed, x, 4)


def _sums(packed: Tensor, x: Tensor, bits: int) -> Tensor:
    # Called by itself, an op costs 0.2 ms.
    compiling = torch.compiler.is_compiling()
    values = byte_values(bits, x.device) if compiling else _byte_values(bits, x.device)
    count, rows = packed.shape[1], packed.shape[0]
    x = functional.pad(x, (0, count * len(values) - x.shape[1]))
    tables = (x.unflatten(1, (count, len(values))) @ values).flatten(1)
    index = packed.int().add_(256 * torch.arange(count, dtype=torch.int32, device=x.device))
    index = index.flatten()
    found = [table.index_select(0, index).view(rows, count).sum(1) for table in tables]
    return torch.stack(found)


@lru_cache
def _byte_values(bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        every_byte = torch.arange(256).to(torch.uint8).unsqueeze(1)
        codes = unpack(every_byte, bits, 8 // bits).float().T
        return (1 - 2 * codes if bits == 1 else codes).contiguous().to(device)


# An op, so that torch.compile need not look inside and trace how the table is made.
@torch.library.custom_op("lowbit::byte_values", mutates_args=())
def byte_values(bits: int, device: torch.device) -> Tensor:
    """What each of the 256 bytes stands for, 1 and -1 or codes: (8 / bits, 256) float32"""
    return _byte_values(bits, device).clone()


@byte_values.register_fake
def _(bits: int, device: torch.device) -> Tensor:
    return torch.empty((8 // bits, 256), dtype=torch.float32, device=device)
