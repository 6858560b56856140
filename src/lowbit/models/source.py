"""The float model that is quantized: never whole in memory, read block by block from its folder."""

from collections.abc import Sequence
from pathlib import Path

from lowbit.blocks import Fold, LinearGroup
from lowbit.checkpoint import CheckpointReader
from lowbit.models.attention import attentions_of
from lowbit.models.streamed import StreamedModel, load_config
from lowbit.models.wiring import folds_of, groups_of, matrices_of
from lowbit.patterns import matches_any


class SourceModel(StreamedModel):
    """A streamed model, and the words in which methods speak of its blocks.

    allow_float: patterns of matrices (names in memory) that may stay float although no group has
    them. Raises ValueError when the folder is already quantized, lacks a tensor, or has a matrix in
    a block that is in no group and not skipped by name.
    """

    def __init__(
        self, folder: Path, allow_float: Sequence[str] = (), trust_remote_code: bool = False
    ) -> None:
        CheckpointReader(folder)  # a folder that is no model at all says so first
        config = load_config(folder, trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{folder} is already quantized; quantize the float model instead")
        super().__init__(folder, config, trust_remote_code)
        self.left_float = self._check_groups(allow_float)

    def disk_name(self, name: str) -> str:
        """The name on disk of a module, given its name in memory."""
        return self.disk_names[f"{name}.weight"].removesuffix(".weight")

    def disk_path(self, name: str) -> str:
        """The name on disk of a module that holds others, given its name in memory."""
        inside = (item for item in self.disk_names.items() if item[0].startswith(f"{name}."))
        ends = ((disk, memory.removeprefix(name)) for memory, disk in inside)
        return next(disk.removesuffix(end) for disk, end in ends if disk.endswith(end))

    def block_tensors(self, name: str) -> list[str]:
        """Names on disk of all tensors of a block."""
        return [d for m, d in self.disk_names.items() if m.startswith(f"{name}.")]

    def outside_tensors(self) -> list[str]:
        """Names on disk of everything that is in no block: embeddings, last norm, lm_head."""
        inside = {d for name in self.block_names for d in self.block_tensors(name)}
        return [name for name in self.reader.tensors if name not in inside]

    def groups(self, name: str) -> tuple[LinearGroup, ...]:
        return groups_of(self.family, self.config, self.skeleton.get_submodule(name))

    def folds(self, name: str) -> tuple[Fold, ...]:
        return folds_of(self.family, self.config, self.skeleton.get_submodule(name))

    def attentions(self, name: str) -> tuple[str, ...]:
        return attentions_of(self.skeleton.get_submodule(name))

    def _check_groups(self, allow_float: Sequence[str]) -> list[str]:
        """Every matrix in exactly one group or skipped by name; returns those left float."""
        problems, left = [], []
        for name in self.block_names:
            grouped = [linear for group in self.groups(name) for linear in group.linears]
            for matrix in matrices_of(self.skeleton.get_submodule(name)):
                full = f"{name}.{matrix}"
                allowed = matrix in self.family.skip or matches_any(full, allow_float)
                count = grouped.count(matrix)
                if count == 0 and allowed:
                    left.append(full)
                elif count != 1:
                    problems.append(f"{full} (in {count} groups)")
        if problems:
            shown = "\n  ".join(problems[:8])
            raise ValueError(
                f"{len(problems)} matrices of {type(self.skeleton).__name__} are not understood:"
                f"\n  {shown}\nGive the architecture a table (CONTRIBUTING.md), or leave them "
                "float with --allow-float PATTERN"
            )
        return left
