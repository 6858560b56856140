"""The codebooks: they map codes to words (vectors of weights) and find the nearest word.

| name       | bits | a code holds                        | bytes of a code                       |
| ---------- | ---- | ----------------------------------- | ------------------------------------- |
| E8P12      | 2    | 8 weights in 16 bits                | 2, low byte first                     |
| E8P12RVQ3B | 3    | 8 weights in 24 bits                | 2 of E8P12, then 1 of E8              |
| E8P12RVQ4B | 4    | 8 weights in 32 bits                | 2 of E8P12, then 2 of E8P12           |
| D4         | 2    | 4 weights in 8 bits                 | 1                                     |
| HI         | 4    | 1 weight in 4 bits                  | 1/2, low half first                   |

- E8P12: the words of `e8p.py`.
- E8P12RVQ3B, E8P12RVQ4B: a word of E8P12 plus `residual_scale` (in float32) times a word of E8 or
  of E8P12. The residual's code is in the upper bits: code = first + 2**16 * residual.
- E8: 256 points of the lattice E8: 0; (+-1, +-1, 0, ...) in every order; (+-1/2, ...) with an even
  sum; and +-2 in one coordinate with 0 in the others, except for -2 in the last coordinate.
- D4: the 256 vectors of four odd multiples of 1/2 whose sum is even and whose squared norm is at
  most 9.
- HI: code - 7.5, for codes of 0 to 15.

The words of E8 and D4 are sorted by their squared norms, and those of equal norm in lexicographic
order. The codebooks are those of QuIP# (arXiv 2402.04396), section 4; the orders are our own.

`scale` is the root mean square that weights should have when they are rounded. For a unit Gaussian
times `scale`, the squared error per weight divided by scale**2 is: E8P12 0.0915, E8P12RVQ3B 0.0295,
E8P12RVQ4B 0.0079, D4 0.1025, HI 0.0115.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.config import unknown_name
from lowbit.formats.lattice import reference, search
from lowbit.formats.lattice.tables import look_up, table
from lowbit.kernels import bits

_WORDS = {16: torch.int16, 32: torch.int32}  # little-endian, as all machines of torch


@dataclass(frozen=True)
class Codebook:
    """A codebook.

    name: its name in an entry.
    dim: number of weights in a word, which one code means.
    code_bits: bits of a code.
    scale: root mean square for which the codebook is best; see the module's docstring.
    residual_scale: factor of the second stage's words; None: there is one stage.
    unit: `write` writes words as multiples of it; with one stage they are small integers.
    """

    name: str
    dim: int
    code_bits: int
    scale: float
    residual_scale: float | None = None
    unit: float = 0.25

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return self.code_bits / self.dim

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of codes in memory: the smallest of uint8, int32 and int64 that holds them."""
        if self.code_bits <= 8:
            return torch.uint8
        return torch.int32 if self.code_bits < 32 else torch.int64

    @abstractmethod
    def write(self, codes: Tensor, into: Tensor) -> None:
        """Writes the words of codes, divided by `unit`.

        codes: (...) code_dtype.
        into: (..., dim) float32.
        """

    def decode(self, codes: Tensor) -> Tensor:
        """Returns the words of codes. codes: (...) code_dtype -> (..., dim) float32"""
        words = torch.empty(*codes.shape, self.dim, device=codes.device)
        self.write(codes, words)
        return words.mul_(self.unit)

    @abstractmethod
    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the nearest word of each vector.

        x: (..., dim).

        Returns the codes (...) code_dtype, and their words (..., dim) float32.
        """

    def blocks(self, in_features: int) -> int:
        """Returns the number of codes of a row; the last word may extend beyond the row."""
        return -(-in_features // self.dim)

    def row_bytes(self, in_features: int) -> int:
        """Returns the bytes of the packed codes of a row."""
        return (self.blocks(in_features) * self.code_bits + 7) // 8

    def pack(self, codes: Tensor) -> Tensor:
        """Packs codes. codes: (..., blocks) code_dtype -> (..., bytes) uint8"""
        if self.code_bits <= 8:
            return bits.pack(codes, self.code_bits)
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**self.code_bits):
            raise ValueError(
                f"codes go from {int(codes.min())} to {int(codes.max())}: allowed in {self.name} "
                f"are 0 to {2**self.code_bits - 1}"
            )
        shifts = torch.arange(0, self.code_bits, 8, device=codes.device)
        return (codes.unsqueeze(-1) >> shifts & 255).to(torch.uint8).flatten(-2)

    def unpack(self, packed: Tensor, blocks: int) -> Tensor:
        """Unpacks codes. packed: (..., bytes) uint8 -> (..., blocks) code_dtype"""
        if self.code_bits <= 8:
            return bits.unpack(packed, self.code_bits, blocks)
        if self.code_bits in _WORDS:
            aligned = packed.reshape(-1).clone()  # a tensor in a file may begin at any byte
            codes = aligned.view(_WORDS[self.code_bits]).to(self.code_dtype)
            codes.bitwise_and_(2**self.code_bits - 1)  # codes are unsigned
            return codes.view(*packed.shape[:-1], blocks)
        parts = packed.unflatten(-1, (blocks, self.code_bits // 8)).to(self.code_dtype)
        codes = parts[..., 0].clone()
        for number in range(1, parts.shape[-1]):
            codes |= parts[..., number] << 8 * number
        return codes


@dataclass(frozen=True)
class Listed(Codebook):
    """A codebook with a table of all words; the nearest word is found by trying all."""

    def write(self, codes: Tensor, into: Tensor) -> None:
        into.copy_(look_up(codes, self.name))

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = reference.nearest(x, table(self.name, x.device)).to(self.code_dtype)
        return codes, self.decode(codes)


@dataclass(frozen=True)
class E8P(Listed):
    """A codebook with a table of all words; the nearest word is found by `search`."""

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = search.nearest(x)
        return codes, self.decode(codes)

    def candidates(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns two near words of each vector, as (codes, words); one of them is the nearest."""
        return [(codes, self.decode(codes)) for codes in search.nearest_of_each_shift(x)]


@dataclass(frozen=True)
class HalfInteger(Codebook):
    """The odd multiples of 1/2 from -15/2 to 15/2; ties are rounded up."""

    unit: float = 0.5

    def write(self, codes: Tensor, into: Tensor) -> None:
        odd = codes.view(torch.int8) * 2 - (2**self.code_bits - 1)
        into.copy_(odd.unsqueeze(-1))

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = 2 ** (self.code_bits - 1)
        below = x.detach().float().floor().clamp_(-half, half - 1)
        codes = (below + half).squeeze(-1).to(torch.uint8)
        return codes, below.add_(0.5)


E8P12 = E8P("E8P12", 8, 16, scale=1.03)


@dataclass(frozen=True)
class Residual(Codebook):
    """Two stages: a word of E8P12, plus a scaled word of another codebook for the residual.

    second: codebook of the residual.
    two_tries: whether `nearest` tries two words of E8P12 instead of the nearest one only. This
        lowers the squared error by 5 % for E8P12RVQ4B, and by less than 0.5 % for E8P12RVQ3B.
    """

    residual_scale: float = 1.0
    second: Listed = E8P12
    two_tries: bool = False

    def write(self, codes: Tensor, into: Tensor) -> None:
        self.second.write(codes >> E8P12.code_bits, into)
        first = look_up(codes & 2**E8P12.code_bits - 1, E8P12.name)
        into.mul_(self.residual_scale).add_(first.float())

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Finds a word near each vector, which need not be the nearest.

        The first stage is rounded first, and then the residual.
        """
        x = x.detach().float()
        tries = E8P12.candidates(x) if self.two_tries else [E8P12.nearest(x)]
        sums = [self._second(x, *first) for first in tries]
        codes, values = sums[0]
        for other, other_values in sums[1:]:
            closer = (other_values - x).square().sum(-1) < (values - x).square().sum(-1)
            codes = torch.where(closer, other, codes)
            values = torch.where(closer.unsqueeze(-1), other_values, values)
        return codes, values

    def _second(self, x: Tensor, codes: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        residual, rest = self.second.nearest((x - values) / self.residual_scale)
        codes = codes.to(self.code_dtype) | residual.to(self.code_dtype) << E8P12.code_bits
        return codes, (rest * self.residual_scale).add_(values)


E8 = Listed("E8", 8, 8, scale=1.0)

CODEBOOKS: dict[str, Codebook] = {
    book.name: book
    for book in (
        E8P12,
        Residual("E8P12RVQ3B", 8, 24, 0.98, residual_scale=1 / 2.04, second=E8),
        Residual("E8P12RVQ4B", 8, 32, 0.90, residual_scale=1 / 3.8, two_tries=True),
        Listed("D4", 4, 8, scale=1.21),
        HalfInteger("HI", 1, 4, scale=2.97),
    )
}


def codebook(name: str, residual_scale: float | None = None) -> Codebook:
    """Returns the codebook of a name.

    residual_scale: replaces that of the codebook; None: keep it.

    Raises ValueError for an unknown name, and for a residual scale of a codebook with one stage.
    """
    if name not in CODEBOOKS:
        raise ValueError(f"codebook: {unknown_name(name, CODEBOOKS, 'codebook')}")
    book = CODEBOOKS[name]
    if residual_scale is None:
        return book
    if book.residual_scale is None:
        raise ValueError(
            f"residual_scale is {residual_scale}: {name} has one stage and takes no residual scale"
        )
    return replace(book, residual_scale=residual_scale)
