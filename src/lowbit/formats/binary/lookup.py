"""Multiplies by packed bits without unpacking them, with look-up tables (T-MAC, arXiv 2407.00088).

A byte of a row is multiplied by 8 inputs (2 for codes of 4 bits). As a byte has 256 values, there
are 256 possible results. A table of all of them takes as long to compute as a few rows; then each
byte costs one look-up.
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

# Above this number of tokens, unpacking the bits is faster. On one thread of a CPU, the look-ups of
# one token take 0.15 times as long as unpacking (4096 x 4096), 0.3 times (2048 x 2048) or as long
# (1024 x 1024). The time for unpacking hardly grows up to 8 tokens.
MOST_TOKENS = 4


class Lookup(Reference):
    """Looks up the sums in tables instead of unpacking the bits, for a few tokens."""

    name = "lookup"

    def supports(
        self,
        layer: "BinaryLinear",
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        gradients: bool,
    ) -> bool:
        return tokens <= MOST_TOKENS and dtype != torch.float64

    def signed_sums(self, packed: Tensor, x: Tensor) -> Tensor:
        return signed_sums(packed, x)

    def weighted_sums(self, packed: Tensor, x: Tensor) -> Tensor:
        return weighted_sums(packed, x)


def signed_sums(packed: Tensor, x: Tensor) -> Tensor:
    """Adds the inputs whose bit is 0 and subtracts those whose bit is 1.

    packed: (out, ceil(n / 8)) uint8, one bit for each input.
    x: (tokens, n) float32.

    Returns (tokens, out) float32.
    """
    return _sums(packed, x, 1)


def weighted_sums(packed: Tensor, x: Tensor) -> Tensor:
    """Sums inputs times codes of 4 bits.

    packed: (out, ceil(n / 2)) uint8, one code for each input.
    x: (tokens, n) float32.

    Returns (tokens, out) float32.
    """
    return _sums(packed, x, 4)


def _sums(packed: Tensor, x: Tensor, bits: int) -> Tensor:
    # A call of the custom op costs 0.2 ms outside of a compiled graph.
    compiling = torch.compiler.is_compiling()
    values = byte_values(bits, x.device) if compiling else _byte_values(bits, x.device)
    count, rows = packed.shape[1], packed.shape[0]
    x = functional.pad(x, (0, count * len(values) - x.shape[1]))
    tables = (x.unflatten(1, (count, len(values))) @ values).flatten(1)
    index = packed.int().add_(256 * torch.arange(count, dtype=torch.int32, device=x.device))
    index = index.flatten()
    sums = [table.index_select(0, index).view(rows, count).sum(1) for table in tables]
    return torch.stack(sums)


@lru_cache
def _byte_values(bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        every_byte = torch.arange(256).to(torch.uint8).unsqueeze(1)
        codes = unpack(every_byte, bits, 8 // bits).float().T
        return (1 - 2 * codes if bits == 1 else codes).contiguous().to(device)


# A custom op, so that torch.compile does not trace how the table is computed.
@torch.library.custom_op("lowbit::byte_values", mutates_args=())
def byte_values(bits: int, device: torch.device) -> Tensor:
    """Returns the values in each of the 256 bytes, signs or codes: (8 / bits, 256) float32."""
    return _byte_values(bits, device).clone()


@byte_values.register_fake
def _(bits: int, device: torch.device) -> Tensor:
    return torch.empty((8 // bits, 256), dtype=torch.float32, device=device)
