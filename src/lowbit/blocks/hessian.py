"""H = E[x x^T] of every group's input: one streaming pass, one matrix per group."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.blocks import LinearGroup, Stream
from lowbit.blocks.capture import observe_inputs

MOST_OF_MEMORY = 0.25  # sums that need a larger share of the memory go to disk
GATHERED = 4  # a product is made of channels / GATHERED rows: they take an eighth of the sum's room


@dataclass(frozen=True)
class Hessian:
    """E[x x^T] of an input.

    matrix: (n, n) float32, the mean over tokens.
    tokens: how many there were.
    """

    matrix: Tensor
    tokens: int


class Hessians(Mapping[str, Hessian]):
    """The Hessians of all groups, by the group's name. Each access computes the matrix anew."""

    def __init__(self, sums: dict[str, "_Sum"], device: torch.device) -> None:
        self._sums = sums
        self._device = device
        self._together: dict[tuple[str, ...], Hessian] = {}

    def tokens(self, group: str) -> int:
        return self._sums[group].tokens

    def together(self, groups: tuple[str, ...]) -> Hessian:
        """The Hessian of several groups as if they were one, for experts that read the same norm.

        It is kept, so that it is computed once.
        """
        if groups not in self._together:
            tokens = sum(self.tokens(group) for group in groups)
            total = sum(self._sums[group].total for group in groups)
            assert isinstance(total, Tensor)
            mean = (total / max(tokens, 1)).to(self._device, torch.float32)
            self._together[groups] = Hessian(mean, tokens)
        return self._together[groups]

    def __getitem__(self, group: str) -> Hessian:
        found = self._sums[group]
        mean = (found.total / max(found.tokens, 1)).to(self._device, torch.float32)
        return Hessian(mean, found.tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


class _Sum:
    """A running sum of x x^T: products of many rows in float32, added up in float64.

    Adding costs n^2, whatever the number of rows: experts see few of a batch, so rows wait.
    """

    def __init__(self, total: Tensor) -> None:
        self.total = total
        self.tokens = 0
        self._waiting: list[Tensor] = []
        self._rows = 0

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.tokens += len(rows)
        self._rows += len(rows)
        enough = self._rows * GATHERED >= len(self.total)
        self._waiting.append(rows if enough else rows.clone())  # a block may write to its inputs
        if enough:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            rows = torch.cat(self._waiting)
            self.total += (rows.T @ rows).to(self.total.device, torch.float64)
        self._waiting, self._rows = [], 0


def input_hessians(block: nn.Module, groups: Sequence[LinearGroup], stream: Stream) -> Hessians:
    """The Hessian of every group's input, by the group's name.

    Sums that would fill the memory live in unnamed files, beside the stream's if that is on disk:
    8 n^2 bytes for a group with n channels.
    """
    first = {group.linears[0]: group.name for group in groups}
    widths = {name: _in_features(block, name) for name in first}
    device = next(block.parameters()).device
    place = _place(sum(8 * n * n for n in widths.values()), device, stream.folder)
    sums = {first[name]: _Sum(_zeros(n, place)) for name, n in widths.items()}
    observe_inputs(block, first, stream, lambda name, x: sums[first[name]].update(x))
    for found in sums.values():
        found.flush()
    return Hessians(sums, device)


def _place(needed: int, device: torch.device, folder: Path | None) -> torch.device | Path:
    """Where sums of so many bytes live: with the block, else in memory, else in a folder."""
    if device.type == "cuda" and needed <= MOST_OF_MEMORY * torch.cuda.mem_get_info(device)[0]:
        return device
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= MOST_OF_MEMORY * memory:
        return torch.device("cpu")
    return folder or Path(tempfile.gettempdir())


def _zeros(channels: int, place: torch.device | Path) -> Tensor:
    shape = (channels, channels)
    if isinstance(place, torch.device):
        return torch.zeros(shape, dtype=torch.float64, device=place)
    with tempfile.NamedTemporaryFile(dir=place, suffix=".f64") as file:
        # A full disk is an error here, but a SIGBUS once mapped. The file goes with the tensor.
        os.posix_fallocate(file.fileno(), 0, 8 * channels * channels)
        flat = torch.from_file(file.name, shared=True, size=channels**2, dtype=torch.float64)
    return flat.view(shape)


def _in_features(block: nn.Module, name: str) -> int:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module.in_features
