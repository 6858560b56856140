"""The float model that is quantized: never whole in memory, read block by block from its folder."""

from collections.abc import Sequence
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lowbit.blocks import Fold, LinearGroup
from lowbit.blocks.capture import Stub, same
from lowbit.blocks.stream import Batch
from lowbit.checkpoint import CheckpointReader
from lowbit.models import family_of
from lowbit.models.skeleton import build_skeleton, memory_names
from lowbit.models.wiring import folds_of, groups_of, matrices_of


class SourceModel:
    """A model folder, streamed.

    allow_float: patterns of matrices (names in memory) that may stay float although no group has
    them. Raises ValueError when the folder is already quantized, lacks a tensor, or has a matrix in
    a block that is in no group and not skipped by name.
    """

    def __init__(
        self, folder: Path, allow_float: Sequence[str] = (), trust_remote_code: bool = False
    ) -> None:
        self.folder = folder
        self.reader = CheckpointReader(folder)
        self.config = load_config(folder, trust_remote_code)
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(f"{folder} is already quantized; quantize the float model instead")
        try:
            self.skeleton = build_skeleton(self.config, trust_remote_code)
        except Exception as error:  # whatever transformers makes of a value that it did not expect
            kind = type(error).__name__
            raise ValueError(f"{folder}/config.json builds no model: {kind}: {error}") from error
        self.family = family_of(self.config, self.skeleton)
        names = memory_names(self.skeleton, self.reader.tensors)
        known = self.skeleton.state_dict()
        self.disk_names = {memory: disk for disk, memory in names.items() if memory in known}
        blocks = self.skeleton.get_submodule(self.family.blocks)
        self.block_names = [
            f"{self.family.blocks}.{i}" for i in range(len(list(blocks.children())))
        ]
        self._check_complete()
        self.left_float = self._check_groups(allow_float)

    def disk_name(self, name: str) -> str:
        """The name on disk of a module, given its name in memory."""
        return self.disk_names[f"{name}.weight"].removesuffix(".weight")

    def block_tensors(self, name: str) -> list[str]:
        """Names on disk of all tensors of a block."""
        return [d for m, d in self.disk_names.items() if m.startswith(f"{name}.")]

    def outside_tensors(self) -> list[str]:
        """Names on disk of everything that is in no block: embeddings, last norm, lm_head."""
        inside = {d for name in self.block_names for d in self.block_tensors(name)}
        return [name for name in self.reader.tensors if name not in inside]

    def load_block(self, name: str, device: torch.device | str = "cpu") -> nn.Module:
        """A block with its weights in float32."""
        block = deepcopy(self.skeleton.get_submodule(name))
        load_tensors(block, name, self.disk_names, self.reader)
        return block.to(device)

    def groups(self, name: str) -> tuple[LinearGroup, ...]:
        return groups_of(self.family, self.config, self.skeleton.get_submodule(name))

    def folds(self, name: str) -> tuple[Fold, ...]:
        return folds_of(self.family, self.config, self.skeleton.get_submodule(name))

    def capture(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
        """Inputs of the first block, and the keyword arguments of every block, per batch.

        batches: (batch, tokens) int64 each
        -> ([(batch, tokens, channels) float32], kwargs[block][batch])
        """
        model = deepcopy(self.skeleton)
        path = self.family.blocks
        blocks = list(model.get_submodule(path).children())
        stubs = nn.ModuleList(Stub(block, self.family.tuple_output) for block in blocks)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, stubs)
        load_tensors(model, "", self.disk_names, self.reader)
        _share_tied(model)
        with torch.no_grad():
            for batch in batches:
                model.base_model(input_ids=batch, use_cache=False)
        calls: list[list[Batch]] = [stub.calls for stub in stubs]  # type: ignore[misc]
        hidden = [call.hidden.float() for call in calls[0]]
        return hidden, _shared_kwargs(calls)

    def _check_complete(self) -> None:
        tied = self.skeleton.all_tied_weights_keys
        absent = [name for name in self.skeleton.state_dict() if name not in self.disk_names]
        absent = [name for name in absent if not _tied_to_present(name, tied, self.disk_names)]
        if absent:
            shown = ", ".join(absent[:5])
            raise ValueError(
                f"{self.folder} lacks {len(absent)} tensors that the model needs: {shown}"
            )
        shapes = {name: tuple(p.shape) for name, p in self.skeleton.state_dict().items()}
        for memory, disk in self.disk_names.items():
            info = self.reader.tensors[disk]
            if info.shape != shapes[memory]:
                raise ValueError(
                    f"{self.folder}: tensor {disk} has shape {list(info.shape)}, "
                    f"config.json asks for {list(shapes[memory])}"
                )
            if info.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{self.folder}: tensor {disk} is {info.dtype}; float32, float16 and bfloat16 "
                    "can be quantized"
                )

    def _check_groups(self, allow_float: Sequence[str]) -> list[str]:
        """Every matrix in exactly one group or skipped by name; returns those left float."""
        problems, left = [], []
        for name in self.block_names:
            grouped = [linear for group in self.groups(name) for linear in group.linears]
            for matrix in matrices_of(self.skeleton.get_submodule(name)):
                full = f"{name}.{matrix}"
                allowed = matrix in self.family.skip or any(fnmatch(full, p) for p in allow_float)
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


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """config.json through transformers; ValueError when it cannot be understood."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and huggingface_hub have many for a bad value
        raise ValueError(f"{folder}/config.json cannot be used: {error}") from error


def load_tensors(
    module: nn.Module, prefix: str, disk_names: dict[str, str], reader: CheckpointReader
) -> None:
    """Fills a meta module with its tensors in float32; those that the folder lacks stay on meta."""
    dot = f"{prefix}." if prefix else ""
    wanted = {
        name: disk_names[dot + name] for name in module.state_dict() if dot + name in disk_names
    }
    found = reader.read(wanted.values())
    state = {name: found[disk].to(torch.float32) for name, disk in wanted.items()}
    module.load_state_dict(state, strict=False, assign=True)
    module.requires_grad_(False)


def _share_tied(model: nn.Module) -> None:
    """Gives a tied parameter that the folder lacks the tensor of its twin."""
    for target, source in model.all_tied_weights_keys.items():  # type: ignore[union-attr, operator]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if target not in parameters or source not in parameters:
            continue
        for missing, present in ((target, source), (source, target)):
            if parameters[missing].is_meta and not parameters[present].is_meta:
                parent, _, attribute = missing.rpartition(".")
                setattr(model.get_submodule(parent), attribute, parameters[present])


def _tied_to_present(name: str, tied: dict[str, str], present: dict[str, str]) -> bool:
    source = tied.get(name, name)
    family = {source, *(t for t, s in tied.items() if s == source)}
    return any(member in present for member in family)


def _shared_kwargs(calls: list[list[Batch]]) -> list[list[dict[str, Any]]]:
    """Keyword arguments per block and batch; what equals the first batch's is kept only once."""
    kept: list[list[dict[str, Any]]] = []
    for block_calls in calls:
        first = block_calls[0].kwargs
        kept.append(
            [
                {
                    k: first[k] if k in first and same(first[k], v) else v
                    for k, v in call.kwargs.items()
                }
                for call in block_calls
            ]
        )
    return kept
