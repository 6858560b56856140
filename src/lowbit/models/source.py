"""The float model that is quantized; it is read from its folder block by block."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from lowbit.blocks import Fold, LinearGroup
from lowbit.checkpoint.recognize import float_folder
from lowbit.models.attention import attentions_of
from lowbit.models.config import load_config
from lowbit.models.fitting import note_unread
from lowbit.models.streamed import StreamedModel
from lowbit.models.wiring import folds_of, groups_of, matrices_of
from lowbit.patterns import matches_any

SOME_FLOAT = 0.02  # the share of a block's weights in float from which on a run warns
MOST_FLOAT = 0.5  # the largest share of all weights in blocks that may stay in float unnamed


class SourceModel(StreamedModel):
    """A streamed float model with the linear groups, folds and attentions of its blocks.

    folder: the folder of the float model.
    allow_float: patterns of matrices (names in memory) that are known to be in no group, and stay
        in float without a warning.
    left_float: attribute, full names of the matrices that stay in float.
    float_shares: attribute, for each block the share of its weights in matrices that stay in float
        and that neither the table of the family nor `allow_float` names.

    Raises ValueError if the model is already quantized, if a tensor is missing, and if more than
    half of the weights would stay in float without being named.
    """

    def __init__(
        self, folder: Path, allow_float: Sequence[str] = (), trust_remote_code: bool = False
    ) -> None:
        float_folder(folder)  # gives the clearest error for a folder that is not a float model
        config = load_config(folder, trust_remote_code)
        super().__init__(folder, config, trust_remote_code)
        note_unread(folder, self.skeleton, self.unread)
        self._groups: dict[str, tuple[LinearGroup, ...]] = {}
        self.left_float, self.float_shares = self._check_groups(allow_float)

    def digest(self, cache: Path | None = None) -> str:
        """Returns a sha256 of the names and contents of all shards.

        cache: folder that keeps the hashes of shards for later runs; None: they are not kept.

        Raises ValueError for a tensor of the model with a value that is NaN or infinite.
        """
        return self.reader.digest(set(self.disk_names.values()), cache)

    def disk_name(self, name: str) -> str:
        """Returns the name on disk of a module with a weight. name: in memory"""
        return self.disk_names[f"{name}.weight"].removesuffix(".weight")

    def disk_path(self, name: str) -> str:
        """Returns the name on disk of a module that contains others. name: in memory"""
        inside = (item for item in self.disk_names.items() if item[0].startswith(f"{name}."))
        ends = ((disk, memory.removeprefix(name)) for memory, disk in inside)
        return next(disk.removesuffix(end) for disk, end in ends if disk.endswith(end))

    def is_view(self, start: str) -> bool:
        """Returns whether tensors whose names in memory start so are stored in another form."""
        views = getattr(self.reader, "views", {})
        return any(d in views for m, d in self.disk_names.items() if m.startswith(start))

    def block_tensors(self, name: str) -> list[str]:
        """Returns the names on disk of all tensors of a block."""
        return self._tensors_of[name]

    @cached_property
    def _tensors_of(self) -> dict[str, list[str]]:
        """The names on disk of the tensors of each block, found in one pass over all tensors."""
        found: dict[str, list[str]] = {name: [] for name in self.block_names}
        start = len(f"{self.family.blocks}.")
        for memory, disk in self.disk_names.items():
            end = memory.find(".", start)
            found.get(memory[:end], []).append(disk)
        return found

    def outside_tensors(self) -> list[str]:
        """Returns the names on disk of all tensors outside blocks: embeddings, norm, lm_head."""
        inside = {d for name in self.block_names for d in self.block_tensors(name)}
        return [name for name in self.reader.tensors if name not in inside]

    def groups(self, name: str) -> tuple[LinearGroup, ...]:
        if name not in self._groups:
            block = self.skeleton.get_submodule(name)
            index = self.block_names.index(name)
            groups = groups_of(self.family, self.config, block, index)
            self._groups[name] = tuple(self._without_shared(name, groups))
        return self._groups[name]

    def _without_shared(self, block: str, groups: Iterable[LinearGroup]) -> Iterator[LinearGroup]:
        """Yields the groups without linears that several blocks have in common: they stay float."""
        shared = {*self.shared, *self.shared.values()}
        for group in groups:
            own = tuple(n for n in group.linears if f"{block}.{n}.weight" not in shared)
            if own:
                yield LinearGroup(group.name, own)

    def folds(self, name: str) -> tuple[Fold, ...]:
        block, index = self.skeleton.get_submodule(name), self.block_names.index(name)
        shared = {*self.shared, *self.shared.values()}
        return tuple(
            fold
            for fold in folds_of(self.family, self.config, block, index)
            if shared.isdisjoint(f"{name}.{end}.weight" for end in (fold.source, *fold.readers))
        )

    def attentions(self, name: str) -> tuple[str, ...]:
        return attentions_of(self.skeleton.get_submodule(name))

    def _check_groups(self, allow_float: Sequence[str]) -> tuple[list[str], dict[str, float]]:
        """Finds the matrices that stay in float: those that no group of linears holds.

        Returns their full names, and for each block its share of weights that stay in float
        although neither `allow_float` nor the table of the family names them.
        """
        left, shares, unnamed = [], {}, []
        lost = total = 0
        for name in self.block_names:
            counts = Counter(linear for group in self.groups(name) for linear in group.linears)
            twice = next((linear for linear, count in counts.items() if count > 1), None)
            if twice is not None:
                raise ValueError(
                    f"{name}.{twice} is in {counts[twice]} groups of linears, but must be in one: "
                    "please report this architecture"
                )
            matrices = matrices_of(self.skeleton.get_submodule(name))
            for later in self.shared:  # the earlier block counts it
                matrices.pop(later.removeprefix(f"{name}.").removesuffix(".weight"), None)
            own = [matrix for matrix in matrices if matrix not in counts]
            left += [f"{name}.{matrix}" for matrix in own]
            other = [matrix for matrix in own if not self._allowed(name, matrix, allow_float)]
            unnamed += [f"{name}.{matrix}" for matrix in other]
            weights = sum(matrices[matrix] for matrix in other)
            shares[name] = weights / max(1, sum(matrices.values()))
            lost += weights
            total += sum(matrices.values())
        if lost > MOST_FLOAT * total:
            shown = "\n  ".join(unnamed[:8])
            raise ValueError(
                f"{lost / total:.0%} of the weights in blocks of {type(self.skeleton).__name__} "
                f"are in {len(unnamed)} parameters that are no nn.Linear and no stack of experts "
                "that lowbit knows, or that several blocks have in common, so they would stay in "
                f"float:\n  {shown}\nLeave them in float with --allow-float PATTERN, or report "
                "this architecture"
            )
        return left, shares

    def float_warnings(self) -> list[str]:
        """Returns a sentence on the block with the most weights in float; [] below SOME_FLOAT.

        What the table of the family or `allow_float` names does not count.
        """
        block = max(self.float_shares, key=lambda name: self.float_shares[name])
        if self.float_shares[block] < SOME_FLOAT:
            return []
        sizes = matrices_of(self.skeleton.get_submodule(block))
        inside = [n.removeprefix(f"{block}.") for n in self.left_float if n.startswith(f"{block}.")]
        largest = sorted(inside, key=lambda name: -sizes[name])[:4]
        return [
            f"{self.float_shares[block]:.0%} of the weights of {block} stay in float, since they "
            "are no linear layer that runs with the text, or are in several blocks: "
            f"{', '.join(largest)}"
        ]

    def _allowed(self, block: str, matrix: str, allow_float: Sequence[str]) -> bool:
        return matrix in self.family.skip or matches_any(f"{block}.{matrix}", allow_float)
