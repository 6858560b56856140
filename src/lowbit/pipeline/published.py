"""Reads the parameters that OmniQuant's own program learned, in its file omni_parameters.pth.

The file has a dictionary for each block, by its number, with these tensors:

LINEAR.weight_quantizer.upbound_factor, lowbound_factor   (out * groups, 1) logits of clipping
qkv_smooth_scale, qkv_smooth_shift   (in,) channels between the first norm and q, k and v
out_smooth_scale, out_smooth_shift   (in,) channels between v and the output of attention
fc1_smooth_scale, fc1_smooth_shift   (in,) channels between the second norm and the MLP
qkt_smooth_scale                     (out,) rows of q, divided, and of k, multiplied

They become what lowbit learns: `LINEAR.clip_low`, `LINEAR.clip_high`, `fold.NAME.log_scale` and
`fold.NAME.shift`. The file states no settings: bits, group size and the rest must be given as its
run had them.

Source: https://github.com/OpenGVLab/OmniQuant, and OmniQuant (arXiv 2308.13137), section 3.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.blocks import Fold
from lowbit.checkpoint.pickled import read_pickled
from lowbit.checkpoint.reader import file_sha256
from lowbit.methods import Method
from lowbit.models.source import SourceModel
from lowbit.parsing import shorten
from lowbit.pipeline.results import block_on_disk

SUFFIXES = (".pth", ".pt")
CLIPS = {
    ".weight_quantizer.upbound_factor": "clip_high",
    ".weight_quantizer.lowbound_factor": "clip_low",
}
# Of each pair of channels: the kind of the fold, and how the names of its readers end.
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "qkv": ("norm", ("q_proj",)),
    "out": ("values", ("o_proj", "out_proj")),
    "fc1": ("norm", ("up_proj", "fc1")),
    "qkt": ("rotary", ("k_proj",)),
}
SMALLEST = 1e-2  # of a scale; OmniQuant raises smaller ones to it before each use
TIED = 1e-3  # the largest difference of scales that count as equal, as a share


class Published:
    """What OmniQuant learned, for a run to start from; see `lowbit.checkpoint.learned.Learned`.

    path: the file.
    source: the float model.
    method: the method of the run.
    warnings: attribute, sentences about scales that are not used as they are.

    Raises ValueError if the file holds anything but tensors, or is of another model.
    """

    def __init__(self, path: Path, source: SourceModel, method: Method) -> None:
        if method.name not in ("omniquant", "matquant"):
            raise ValueError(
                f"--start-from {path}: it holds parameters of OmniQuant, which {method.name} does "
                "not learn: choose the method omniquant, or matquant"
            )
        self.path, self.source = path, source
        # Without rounded inputs, scaling rows of q and k scales their grids, and changes no code.
        self.inputs = getattr(method, "activation_bits", None) is not None
        self.blocks = _blocks(path, len(source.block_names))
        self.untied: list[str] = []
        for index in range(1, 1 + len(self.blocks)):  # so that every error comes before the run
            self.of(index)
        self.warnings = self._warnings()

    def digest(self) -> str:
        """Returns a sha256 of the file."""
        return file_sha256(self.path)

    def of(self, index: int) -> dict[str, Tensor]:
        """Returns the learned parameters of the block in shard `index`, in lowbit's names."""
        name = self.source.block_names[index - 1]
        inside = f"{block_on_disk(self.source, name)}."
        linears = {
            self.source.disk_name(f"{name}.{linear}").removeprefix(inside): linear
            for group in self.source.groups(name)
            for linear in group.linears
        }
        found: dict[str, Tensor] = {}
        for key, tensor in self.blocks[index - 1].items():
            try:
                found |= self._named(key, tensor.float(), name, linears)
            except ValueError as error:
                raise ValueError(f"{self.path}, block {index - 1}: {key} {error}") from None
        return found

    def _named(
        self, key: str, tensor: Tensor, block: str, linears: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """Returns a tensor in our names; nothing if it has no effect.

        key: its name in the file.
        linears: names in memory, by name on disk, of the linears of the block.

        Raises ValueError, as the rest of a sentence about the tensor.
        """
        if not bool(tensor.isfinite().all()):
            raise ValueError("has values that are not finite")
        for end, ours in CLIPS.items():
            if key.endswith(end):
                return self._clip(tensor, block, linears.get(key.removesuffix(end)), ours)
        place, _, part = key.partition("_smooth_")
        if place not in PLACES or part not in ("scale", "shift"):
            raise ValueError("is no parameter of OmniQuant")
        unused = part == "shift" and not bool(tensor.any())
        if unused or (place == "qkt" and not self.inputs):
            return {}
        kind, ends = PLACES[place]
        folds = [f for f in self.source.folds(block) if f.kind == kind and _reads(f, ends)]
        if len(folds) != 1:
            raise ValueError("has no place in this model, where no channels can be rescaled so")
        return self._fold(folds[0], tensor.flatten(), part, f"{block}: {key}")

    def _clip(self, tensor: Tensor, block: str, linear: str | None, ours: str) -> dict[str, Tensor]:
        if linear is None:
            raise ValueError("is about a linear that the model does not have")
        rows = self.source.skeleton.get_parameter(f"{block}.{linear}.weight").shape[0]
        if tensor.numel() % rows or not tensor.numel():
            raise ValueError(f"has {tensor.numel()} values, but its linear has {rows} rows")
        return {f"{linear}.{ours}": tensor.reshape(rows, -1)}

    def _fold(self, fold: Fold, values: Tensor, part: str, where: str) -> dict[str, Tensor]:
        """Returns the scales or shifts of the free channels of a fold.

        values: of each column of the readers; of a rotary fold, of each row of the source.
        """
        channels = fold.source_channels if fold.kind == "rotary" else fold.reader_channels
        count = fold.size if channels is None else len(channels)
        if len(values) != count:
            raise ValueError(f"has {len(values)} values, but the model has {count} such channels")
        if part == "shift":
            return {f"fold.{fold.name}.shift": _means(values, channels, fold.size)}
        if bool((values <= 0).any()):
            raise ValueError("has scales that are not positive, which change signs")
        logs = values.clamp(min=SMALLEST).log()
        free = _means(logs, channels, fold.size)
        if channels is not None and float((logs - free[channels]).abs().max()) > TIED:
            self.untied.append(where)
        return {f"fold.{fold.name}.log_scale": free}

    def _warnings(self) -> list[str]:
        if not self.untied:
            return []
        first, others = self.untied[0], len(self.untied) - 1
        more = f", and {others} more" if others else ""
        return [
            f"{self.path.name} has other scales for channels that must have one in common, as the "
            f"two of a rotary pair ({first}{more}): OmniQuant's block computes something else than "
            "the float block; their geometric means are used"
        ]


def _blocks(path: Path, count: int) -> list[dict[str, Tensor]]:
    """Returns the dictionary of each block. count: the blocks of the model"""
    read: Any = read_pickled(path)
    numbers = sorted(read) if isinstance(read, dict) and all(type(k) is int for k in read) else None
    if (
        not isinstance(read, dict)
        or numbers is None
        or not all(_is_block(b) for b in read.values())
    ):
        raise ValueError(
            f"{path} is no file of OmniQuant: it must have a dictionary of tensors for each block, "
            "by its number"
        )
    if numbers != list(range(count)):
        shown = shorten(", ".join(map(str, numbers)) or "none")
        raise ValueError(
            f"{path} has the blocks {shown}, but the model has {count}, from 0 on: it is of "
            "another model, or of a run that was stopped"
        )
    return [dict(read[number]) for number in numbers]


def _is_block(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()
        for name, tensor in value.items()
    )


def _reads(fold: Fold, ends: Sequence[str]) -> bool:
    """Returns whether the name of a reader of a fold ends so."""
    return any(reader.rpartition(".")[2] in ends for reader in fold.readers)


def _means(values: Tensor, channels: Tensor | None, size: int) -> Tensor:
    """Returns the mean of the values of each free channel: (size,)."""
    if channels is None:
        return values
    total = torch.zeros(size).index_add(0, channels.cpu(), values)
    return total / torch.zeros(size).index_add(0, channels.cpu(), torch.ones_like(values))
