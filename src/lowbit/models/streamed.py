"""A model that is read from its folder and run block by block, with one block in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.blocks.added import with_added
from lowbit.blocks.capture import BlockStub, call_block, copied_around
from lowbit.blocks.handed import Handed, hand_on, with_dictionary
from lowbit.blocks.stream import Batch, Stream
from lowbit.blocks.walk import Step
from lowbit.checkpoint import CheckpointReader, open_checkpoint
from lowbit.checkpoint.views import ViewingReader
from lowbit.kernels.at_once import at_once
from lowbit.models import family_of
from lowbit.models.config import build_model
from lowbit.models.fitting import missing_tensors, wrong_shape
from lowbit.models.sizes import vocabulary_of
from lowbit.models.skeleton import memory_names, views_of
from lowbit.ranks import ALONE, Ranks

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Inputs = Tensor | Mapping[str, Tensor]  # of a forward pass: token ids alone, or all by name
Progress = Callable[[int, int], None]  # number of steps done, number of all steps
LOGITS = 2**25  # most logits at a time (128 MiB); a text is computed in such pieces


class StreamedModel:
    """A model that is read from a folder and run block by block, in float32.

    folder: the folder of a float or quantized model.
    config: the config of this folder, from `models.config.load_config`.
    prepare: called with the model while its parameters are on the meta device, to replace linears
        by quantized layers. Quantized layers keep the dtypes of their tensors (their `_apply`
        ignores conversions); everything else becomes float32.

    unread: attribute, tensors of the folder that the model does not read.
    shared: attribute, tensors that a block has in common with an earlier block (Zamba): the name in
        memory in the earlier block, by that in the later one.

    Raises ValueError if config.json does not describe a model, and for a tensor that is missing or
    has the wrong shape or dtype.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        trust_remote_code: bool = False,
        prepare: Callable[[PreTrainedModel], None] = lambda model: None,
    ) -> None:
        self.folder = folder
        self.reader = open_checkpoint(folder)
        self.config = config
        self.trust_remote_code = trust_remote_code
        self.skeleton = build_model(folder, config, trust_remote_code)
        self.family = family_of(self.skeleton)  # found with float linears
        prepare(self.skeleton)
        views = views_of(self.skeleton, self.reader.tensors)
        if views:
            self.reader = ViewingReader(self.reader, views)
        names = memory_names(self.skeleton, self.reader.tensors)
        state = self.skeleton.state_dict()
        self.disk_names = {memory: disk for disk, memory in names.items() if memory in state}
        self.unread = [memory for memory in names.values() if memory not in state]
        blocks = self.skeleton.get_submodule(self.family.blocks)
        self.block_names = [
            f"{self.family.blocks}.{i}" for i in range(len(list(blocks.children())))
        ]
        self._check_complete()
        tied = self.skeleton.all_tied_weights_keys.items()
        inside = f"{self.family.blocks}."
        self.shared = {t: s for t, s in tied if t.startswith(inside) and s.startswith(inside)}

    @property
    def vocabulary(self) -> int:
        """The number of tokens that have an embedding."""
        embedding: Any = self.skeleton.get_input_embeddings()
        return int(embedding.weight.shape[0])

    @property
    def names_to_load(self) -> dict[str, str]:
        """Names on disk by names in memory, of shared tensors under each of their names."""
        return self.disk_names | {t: self.disk_names[s] for t, s in self.shared.items()}

    def load_block(self, name: str, device: torch.device | str = "cpu") -> nn.Module:
        """Returns a block with its weights, in float32."""
        block = deepcopy(self.skeleton.get_submodule(name))
        load_tensors(block, name, self.names_to_load, self.reader, device)
        hand_on(block, self.block_names.index(name), self.family.handed)
        return block.to(device)

    def _read_ahead(self, name: str) -> None:
        """Lets the operating system fetch the tensors of a block that is loaded next."""
        names = self.names_to_load.items()
        self.reader.read_ahead({disk for own, disk in names if own.startswith(f"{name}.")})

    def without_blocks(
        self, device: torch.device | str = "cpu", head: bool = True
    ) -> "ModelWithoutBlocks":
        """Returns the parts of the model outside its blocks with their weights, in float32.

        head: whether the output layer is loaded.
        """
        model: Any = copied_around(self.skeleton, self.family.blocks)
        if not head and not model.all_tied_weights_keys and model.get_output_embeddings():
            model.set_output_embeddings(nn.Identity())
        family = self.family
        without_blocks = ModelWithoutBlocks(
            model, family.blocks, family.tuple_output, family.handed
        )
        load_tensors(model, "", self.disk_names, self.reader)
        share_tied(model)
        model.to(device)
        return without_blocks

    def first_stream(
        self,
        batches: Iterable[Inputs],
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        embed_on: torch.device | str = "cpu",
        changed: Mapping[str, Tensor] | None = None,
        ranks: Ranks = ALONE,
    ) -> Stream:
        """Returns the stream of hidden states with the inputs of the first block.

        batches: (batch, tokens) int64 each, of any lengths; or as for `ModelWithoutBlocks.calls`.
        device: where the stream's batches are moved when they are read.
        folder: where hidden states are kept on disk; None: in memory.
        embed_on: where embeddings and masks are computed.
        changed: parameters outside the blocks that have other values, by name in memory.
        ranks: the processes that share the batches.
        """
        outside = self.without_blocks(embed_on, head=False)
        with torch.no_grad():
            for name, tensor in (changed or {}).items():
                outside.model.get_parameter(name).copy_(tensor)
        every = list(batches)
        calls = (outside.calls(every[i]) for i in ranks.own(len(every)))
        return Stream.of_calls(calls, device, folder, ranks, len(every))

    def moved(
        self, stream: Stream, index: int, device: torch.device | str = "cpu", block: Any = None
    ) -> Stream:
        """Returns a copy of a stream, moved to a block that can run with it.

        Its hidden states are still those of the first block, if the block can run with them alone.
        A block that reads state of earlier blocks gets it from them: they run in float.

        stream: at the first block.
        index: the index of the block.
        block: the block, if it is loaded already.
        """
        own = stream.copy()
        if not self.family.handed:
            own.block = index
            with suppress(Exception), torch.no_grad():  # of the model's own code, for want of state
                block = self.load_block(self.block_names[index], device) if block is None else block
                call_block(block, own[0])
                return own
            own.block = 0
        self.walk({"float": own}, lambda step: step.advance(), device, range(index))
        return own

    def walk(
        self,
        streams: Mapping[str, Stream],
        visit: Callable[[Step], None],
        device: torch.device | str = "cpu",
        indices: Iterable[int] | None = None,
    ) -> None:
        """Loads the blocks one after another and calls `visit` with each; the only such loop.

        streams: the streams with the inputs of the first of these blocks, by name.
        visit: called with each block; it runs the streams through the block with `Step.advance`.
            When it returns, the block is freed, and the next one is loaded.
        device: where blocks are loaded.
        indices: indices of the blocks to visit, in this order, read one by one; None: all of them.
        """
        chosen = range(len(self.block_names)) if indices is None else indices
        following = dict(pairwise(chosen)) if isinstance(chosen, Sequence) else {}
        for index in chosen:
            name = self.block_names[index]
            block = self.load_block(name, device)
            if index in following:
                self._read_ahead(self.block_names[following[index]])
            step = Step(index=index, name=name, block=block, streams=streams)
            del block
            visit(step)
            del step

    def run(
        self,
        batches: Sequence[Tensor],
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        progress: Progress = lambda done, of: None,
        ranks: Ranks = ALONE,
    ) -> Stream:
        """Returns the outputs of the last block, (batch, tokens, channels) float32 for each batch.

        batches: (batch, tokens) int64 each, of any lengths.
        device: where blocks, embeddings and masks are computed.
        folder: where hidden states are kept on disk; None: in memory.
        progress: called as progress(done, total); each batch in each block is one step.
        ranks: the processes that share the batches.
        """
        stream = self.first_stream(batches, device, folder, embed_on=device, ranks=ranks)
        steps, own = count(1), ranks.own(len(batches))

        def on_batch() -> None:
            progress(next(steps), len(self.block_names) * len(own))

        self.walk({"hidden": stream}, lambda step: step.advance(on_batch=on_batch), device)
        return stream

    def _check_complete(self) -> None:
        tied = self.skeleton.all_tied_weights_keys
        needed = self.skeleton.state_dict()
        absent = [name for name in needed if name not in self.disk_names]
        absent = [name for name in absent if not _tied_to_present(name, tied, self.disk_names)]
        if absent:
            raise missing_tensors(self.folder, absent)
        for memory, disk in self.disk_names.items():
            info, wanted = self.reader.tensors[disk], needed[memory]
            if info.shape != tuple(wanted.shape):
                raise wrong_shape(self.folder, disk, info.shape, wanted.shape)
            if info.dtype not in FLOATS and info.dtype != wanted.dtype:
                raise ValueError(
                    f"{self.folder}: tensor {disk} is {info.dtype}: allowed are float32, float16 "
                    "and bfloat16"
                )


class ModelWithoutBlocks:
    """Runs a model's own forward without its blocks: embeddings, masks, last norm, output layer.

    model: its blocks are replaced by stubs, so their parameters may be on the meta device.
    blocks: path of the list of blocks.
    tuple_output, handed: as in `Family`.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: str, tuple_output: int, handed: Handed = ()
    ) -> None:
        self.model = model
        self.handed = handed
        children = list(model.get_submodule(blocks).children())
        self.stubs = [BlockStub(block, tuple_output) for block in children[:-1]]
        self.last = LastBlockStub(children[-1], tuple_output)
        self.stubs.append(self.last)
        parent, _, attribute = blocks.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.ModuleList(self.stubs))

    def calls(self, batch: Inputs) -> list[Batch]:
        """Returns the arguments of every block, with the hidden states of the first one in all.

        batch: (batch, tokens) int64, or the arguments of the forward pass by name, such as
            input_ids and pixel_values.
        """
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        with torch.no_grad():
            self.model.base_model(**inputs, use_cache=False)
        calls = [stub.calls.pop() for stub in self.stubs]
        if len(inputs) > 1:  # with text alone, the self-check has seen that nothing is added
            calls = with_added(calls)
        return with_dictionary(calls, self.handed)

    def logits(self, tokens: Tensor, hidden: Tensor, gradients: bool = False) -> Tensor:
        """Returns the logits for given outputs of the last block.

        Each token is computed independently, so a long text can be passed in pieces.

        tokens: (batch, tokens) int64
        hidden: (batch, tokens, channels) float32, the output of the last block
        gradients: whether the logits have gradients.

        Returns (batch, tokens, vocabulary) float32.
        """
        self.last.hidden = hidden.to(self._device)
        try:
            with torch.set_grad_enabled(gradients):
                logits: Tensor = self.model(
                    input_ids=tokens.to(self._device), use_cache=False
                ).logits
        finally:
            self.last.hidden = None
            for stub in self.stubs:
                stub.calls.clear()
        return logits

    def losses(
        self,
        tokens: Tensor,
        hidden: Tensor,
        loss: Callable[[int, slice, Tensor], Tensor],
        gradient: Tensor | None = None,
        weight: float = 1.0,
    ) -> float:
        """Returns the sum of a loss of the logits, a piece of the text at a time.

        tokens: (windows, tokens) int64.
        hidden: (..., windows, at least as many tokens, channels), the output of the last block.
        loss: given the index of a window, a part of its tokens and their logits (tokens of the
            part, vocabulary) float32, returns the sum of their losses.
        gradient: takes the gradient by `hidden`, in its shape; None: it is not computed.
        weight: by which the gradient is multiplied.
        """
        total = 0.0
        length = tokens.shape[1]
        together = max(1, at_once(LOGITS) // vocabulary_of(self.model.config))
        for row in range(len(tokens)):
            for start in range(0, length, together):
                part = slice(start, min(start + together, length))
                place = (..., slice(row, row + 1), part, slice(None))
                piece = hidden[place].to(self._device).requires_grad_(gradient is not None)
                logits = self.logits(tokens[row : row + 1, part], piece, gradient is not None)
                with torch.set_grad_enabled(gradient is not None):
                    found = loss(row, part, logits[0].float())
                    weighted = found * weight
                total += float(found.detach())
                if gradient is not None:
                    weighted.backward()
                    assert piece.grad is not None
                    gradient[place] = piece.grad.to(gradient.device)
        return total

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


class LastBlockStub(BlockStub):
    """Stands for the last block when only the parts outside the blocks run.

    hidden: attribute, (batch, tokens, channels), the real output of the last block, which the stub
        returns; None: it returns its input.
    """

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        unchanged = super().forward(*args, **kwargs)
        if self.hidden is None:
            return unchanged
        return self.output(self.hidden)


def load_tensors(
    module: nn.Module,
    prefix: str,
    disk_names: dict[str, str],
    reader: CheckpointReader,
    device: torch.device | str = "cpu",
) -> None:
    """Fills a module on the meta device with its tensors, in float32.

    Tensors that the folder lacks stay on the meta device. Quantized layers keep the stored dtypes.

    prefix: name of the module in the model; "" for the model itself.
    disk_names: names on disk of the model's tensors, by name in memory.
    device: where the tensors are moved, in the dtype in which they are stored.
    """
    dot = f"{prefix}." if prefix else ""
    wanted = {
        name: disk_names[dot + name] for name in module.state_dict() if dot + name in disk_names
    }
    stored = reader.read_finite(wanted.values())
    state = {name: stored[disk].to(device) for name, disk in wanted.items()}
    module.load_state_dict(state, strict=False, assign=True)
    module.requires_grad_(False)
    module.float()


def share_tied(model: nn.Module) -> None:
    """Sets each tied parameter that the folder lacks to the parameter that it is tied to."""
    for target, source in model.all_tied_weights_keys.items():  # type: ignore[union-attr, operator]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if target not in parameters or source not in parameters:
            continue
        for missing, present in ((target, source), (source, target)):
            if parameters[missing].is_meta and not parameters[present].is_meta:
                parent, _, attribute = missing.rpartition(".")
                setattr(model.get_submodule(parent), attribute, parameters[present])


def _tied_to_present(name: str, tied: dict[str, str], present: dict[str, str]) -> bool:
    """Whether a parameter that is tied to `name` is present."""
    source = tied.get(name, name)
    tied_together = {source, *(t for t, s in tied.items() if s == source)}
    return any(parameter in present for parameter in tied_together)
