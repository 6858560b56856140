"""The float model that is quantized; it is read from its folder block by block."""

from collections.abc import Sequence
from pathlib import Path

from lowbit.blocks import Fold, LinearGroup
from lowbit.checkpoint.recognize import float_folder
from lowbit.models.attention import attentions_of
from lowbit.models.fitting import note_unread
from lowbit.models.streamed import StreamedModel, load_config
from lowbit.models.wiring import folds_of, groups_of, matrices_of
from lowbit.patterns import matches_any


class SourceModel(StreamedModel):
    """A streamed float model with the linear groups, folds and attentions of its blocks.

    folder: the folder of the float model.
    allow_float: patterns of matrices (names in memory) that may stay in float although they are in
        no group.
    left_float: attribute, full names of the matrices that stay in float.

    Raises ValueError if the model is already quantized, if a tensor is missing, and for a matrix in
    a block that is in no group and may not stay in float.
    """

    def __init__(
        self, folder: Path, allow_float: Sequence[str] = (), trust_remote_code: bool = False
    ) -> None:
        float_folder(folder)  # gives the clearest error for a folder that is not a float model
        config = load_config(folder, trust_remote_code)
        super().__init__(folder, config, trust_remote_code)
        note_unread(folder, self.skeleton, self.unread)
        self.left_float = self._check_groups(allow_float)

    def digest(self) -> str:
        """Returns a sha256 of the names and contents of all shards.

        Raises ValueError for a tensor of the model with a value that is NaN or infinite.
        """
        return self.reader.digest(set(self.disk_names.values()))

    def disk_name(self, name: str) -> str:
        """Returns the name on disk of a module with a weight. name: in memory"""
        return self.disk_names[f"{name}.weight"].removesuffix(".weight")

    def disk_path(self, name: str) -> str:
        """Returns the name on disk of a module that contains others. name: in memory"""
        inside = (item for item in self.disk_names.items() if item[0].startswith(f"{name}."))
        ends = ((disk, memory.removeprefix(name)) for memory, disk in inside)
        return next(disk.removesuffix(end) for disk, end in ends if disk.endswith(end))

    def block_tensors(self, name: str) -> list[str]:
        """Returns the names on disk of all tensors of a block."""
        return [d for m, d in self.disk_names.items() if m.startswith(f"{name}.")]

    def outside_tensors(self) -> list[str]:
        """Returns the names on disk of all tensors outside blocks: embeddings, norm, lm_head."""
        inside = {d for name in self.block_names for d in self.block_tensors(name)}
        return [name for name in self.reader.tensors if name not in inside]

    def groups(self, name: str) -> tuple[LinearGroup, ...]:
        return groups_of(self.family, self.config, self.skeleton.get_submodule(name))

    def folds(self, name: str) -> tuple[Fold, ...]:
        return folds_of(self.family, self.config, self.skeleton.get_submodule(name))

    def attentions(self, name: str) -> tuple[str, ...]:
        return attentions_of(self.skeleton.get_submodule(name))

    def _check_groups(self, allow_float: Sequence[str]) -> list[str]:
        """Checks that every matrix of a block is in one group, or may stay in float.

        Returns the full names of those that stay in float.
        """
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
                f"{len(problems)} matrices of {type(self.skeleton).__name__} are not in exactly "
                f"one group of linears:\n  {shown}\nAdd a table for this architecture, as "
                "CONTRIBUTING.md explains, or leave them in float with --allow-float PATTERN"
            )
        return left
