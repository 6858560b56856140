"""What a run and its rehearsal do alike: text to streams, a block to its shard, streams onward."""

import hashlib
import os
import time
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blocks import BlockResult, BlockTask, Event, Stream
from lowbit.blocks.capture import call_block
from lowbit.calibration import Calibration, TokenWindows, token_windows
from lowbit.checkpoint import CheckpointWriter, file_sha256
from lowbit.checkpoint.learned import Learned
from lowbit.methods import Method
from lowbit.models.locate import locate
from lowbit.models.source import SourceModel
from lowbit.models.tokenizer import load_tokenizer
from lowbit.pipeline.head import outside_blocks
from lowbit.pipeline.memory import PeakMemory
from lowbit.pipeline.options import RunOptions, choose_device
from lowbit.pipeline.results import as_stored, shard_of
from lowbit.pipeline.selection import Selection, pack_float_experts
from lowbit.version import __version__

Log = Callable[[Event], None]
MOST_OF_MEMORY = 0.25  # streams that need a larger share of the machine's memory go to disk


class Job:
    """A model, a method, its text and the options, checked against each other.

    Raises ValueError where they do not fit.
    """

    def __init__(
        self,
        model: str | Path,
        method: Method,
        calibration: Calibration | None,
        options: RunOptions,
    ) -> None:
        folder = locate(model, options.trust_remote_code)
        self.source = SourceModel(folder, options.allow_float, options.trust_remote_code)
        # Not the path: a folder's name, a hub id as it is (its snapshot is named by a commit).
        self.name = folder.absolute().name if Path(model).is_dir() else str(model)
        self.method = method
        self.calibration = calibration or Calibration()
        self.options = options
        self.device = choose_device(options.device)
        self.selection = Selection(self.source, options.skip, options.only)
        self.selection.check_patterns("overrides:", tuple(method.overrides))
        self.start = self._start()
        self.blocks = self.source.block_names
        self.shards = 1 + len(self.blocks)

    def with_epochs(self, epochs: int) -> "Job":
        """The same job for a method that has epochs, with so many."""
        other = copy(self)
        other.method = self.method.model_copy(update={"epochs": epochs})
        return other

    def _start(self) -> Learned | None:
        if self.options.start_from is None:
            return None
        if not self.method.learns:
            raise ValueError(
                f"--start-from needs a method that learns; {self.method.name} does not"
            )
        return Learned(self.options.start_from, 1 + len(self.source.block_names))

    def windows(self) -> TokenWindows | None:
        """The calibration text; None for a method without streams."""
        if not self.method.streams():
            return None
        tokenizer = load_tokenizer(self.source.folder, self.options.trust_remote_code)
        context = getattr(self.source.config, "max_position_embeddings", None)
        return token_windows(self.calibration, tokenizer, context, self.options.cache)

    def signature(self, windows: TokenWindows | None) -> dict[str, Any]:
        """Everything that shapes the result, as JSON values."""
        config = file_sha256(self.source.folder / "config.json")
        model = hashlib.sha256(f"{config} {self.source.reader.digest()}".encode()).hexdigest()
        options = self.options.shaping_result()
        options["device"] = self.device.type  # its results do not depend on which of several it is
        options["start_from"] = self.start and self.start.digest()  # nor on where that folder is
        return {
            "method": self.method.signature(),
            "model": model,
            "calibration": windows and windows.digest,
            "seed": self.calibration.seed,
            **options,
            "versions": {"lowbit": __version__, "torch": torch.__version__},
        }

    def stream_bytes(self, tokens: Tensor) -> int:
        """What the hidden states of one stream take. tokens: (windows, seqlen)"""
        channels: int = self.source.config.hidden_size
        return tokens.numel() * channels * torch.float32.itemsize

    def room_for_streams(self, tokens: Tensor) -> int:
        """What all streams take, with one more for each: methods keep targets beside the inputs."""
        return 2 * len(self.method.streams()) * self.stream_bytes(tokens)

    def streams_on_disk(self, tokens: Tensor) -> bool:
        if self.options.streams != "auto":
            return self.options.streams == "disk"
        return self.room_for_streams(tokens) > MOST_OF_MEMORY * physical_memory()

    def write_outside(self, writer: CheckpointWriter) -> None:
        """Embeddings, last norm and lm_head, in shard 0."""
        tensors, record = outside_blocks(self.source, self.options.lm_head_bits)
        writer.write_shard(0, tensors, None, record)

    def first_streams(
        self, tokens: Tensor, folder: Path | None
    ) -> tuple[dict[str, Stream], list[list[dict[str, Any]]]]:
        """All streams at the first block, in memory or in a folder; kwargs[block][batch].

        tokens: (windows, seqlen)
        """
        inputs = self.source.inputs(tokens.split(self.method.windows_per_batch()))
        nothing: list[dict[str, Any]] = [{} for _ in range(len(inputs))]
        names = self.method.streams()
        first = Stream(inputs, nothing, self.device, folder and folder / names[0])
        kwargs = inputs.kwargs
        del inputs  # and the embeddings with it
        streams = {names[0]: first}
        for name in names[1:]:
            hidden = (batch.hidden.clone() for batch in first)
            streams[name] = Stream(hidden, nothing, self.device, folder and folder / name)
        return streams, kwargs

    def quantize_block(
        self,
        writer: CheckpointWriter,
        index: int,
        block: nn.Module,
        streams: dict[str, Stream],
        log: Log,
    ) -> BlockResult:
        """Quantizes one block and writes its shard; the result is what was written."""
        name, started = self.blocks[index], time.perf_counter()
        place = {"block": name, "index": index, "of": len(self.blocks)}
        log(Event("block", place))
        task = BlockTask(
            name,
            block,
            self.selection.groups(name),
            self.source.folds(name),
            streams,
            generator_for(self.calibration.seed, name),
            lambda event: log(Event(event.kind, place | event.data)),
            self.start.of(index + 1) if self.start else {},
            self.source.attentions(name),
        )
        with PeakMemory(self.device) as peak:
            result = self.method.quantize(task) if task.groups else BlockResult({})
            pack_float_experts(block, result)
            result = as_stored(result, self.source, name)
            first = not any((writer.record(i) or {}).get("modules") for i in range(index + 1))
            tensors, record = shard_of(result, self.source, name, first)
            learned = result.learned if self.method.learns else None
            writer.write_shard(index + 1, tensors, learned, record)
        said = result.report
        facts: dict[str, Any] = {k: said[k] for k in ("loss_rtn", "loss_after") if k in said}
        linears = said.get("linears", {}).values()
        if proxies := [found["proxy_loss"] for found in linears if "proxy_loss" in found]:
            facts["proxy_loss"] = max(proxies)
        seconds = {"seconds": round(time.perf_counter() - started, 3)}
        log(Event("finished", place | facts | seconds | peak.found))
        return result

    def advance(self, block: nn.Module, result: BlockResult, streams: dict[str, Stream]) -> None:
        """Every stream through what it must come through; the last one uses up the block."""
        with torch.no_grad():
            for i, (name, stream) in enumerate(streams.items()):
                passed = block if i == len(streams) - 1 else deepcopy(block)
                self.method.install(passed, result, name)
                for number, batch in enumerate(stream):
                    stream.replace(number, call_block(passed, batch))


def generator_for(seed: int, block: str) -> torch.Generator:
    """Seeded by seed and block alone: a resumed run draws the same numbers."""
    digest = hashlib.sha256(f"{seed} {block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
