"""Quantize a folder block by block; see `quantize`."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blocks import BlockResult, BlockTask, Event, Stream
from lowbit.blocks.capture import call_block
from lowbit.calibration import Calibration, TokenWindows, token_windows
from lowbit.checkpoint import CheckpointWriter, file_sha256
from lowbit.checkpoint.learned import Learned
from lowbit.checkpoint.output import final_config, report_of
from lowbit.checkpoint.writer import explained
from lowbit.methods import Method
from lowbit.models.locate import locate
from lowbit.models.source import SourceModel
from lowbit.models.tokenizer import load_tokenizer
from lowbit.pipeline.head import outside_blocks
from lowbit.pipeline.memory import PeakMemory
from lowbit.pipeline.options import RunOptions, choose_device
from lowbit.pipeline.results import as_stored, left_float, result_of, shard_of
from lowbit.pipeline.selection import Selection, pack_float_experts
from lowbit.version import __version__

Log = Callable[[Event], None]
MOST_OF_MEMORY = 0.25  # streams that need a larger share of the machine's memory go to disk

# What OUT gets besides weights: tokenizer, chat template, generation settings, licences.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def quantize(
    model: str | Path,
    out: str | Path,
    method: Method,
    calibration: Calibration | None = None,
    on_event: Log = lambda event: None,
    **options: Any,
) -> Path:
    """Quantizes `model` (a folder or a hub id) into the folder `out` and returns that folder.

    The same call continues an interrupted run to the same bytes. calibration: what the streams are
    made of; unused by methods without streams. on_event: called with every `Event`. options: the
    fields of `RunOptions`. Raises ValueError for anything that the caller can mend; what was
    finished stays in `out`.
    """
    chosen = RunOptions(**options)
    folder = locate(model, chosen.trust_remote_code)
    source = SourceModel(folder, chosen.allow_float, chosen.trust_remote_code)
    # Not the path: a folder's name, a hub id as it is (its snapshot is named by a commit).
    name = folder.name if Path(model).is_dir() else str(model)
    run = _Run(source, name, method, calibration or Calibration(), chosen, on_event)
    return run.into(Path(out))


class _Run:
    def __init__(
        self,
        source: SourceModel,
        name: str,
        method: Method,
        calibration: Calibration,
        options: RunOptions,
        on_event: Log,
    ) -> None:
        self.source = source
        self.name = name
        self.method = method
        self.calibration = calibration
        self.options = options
        self.on_event = on_event
        self.device = choose_device(options.device)
        self.selection = Selection(source, options.skip, options.only)
        self.selection.check_patterns("overrides:", tuple(method.overrides))
        self.start = self._start()

    def into(self, out: Path) -> Path:
        windows = self._windows()
        signature = self._signature(windows)
        shards = 1 + len(self.source.block_names)
        with CheckpointWriter(out, signature, shards, self.options.restart) as writer:
            if writer.complete:
                self._log(writer, Event("complete", {"out": str(out)}))
                return out
            start = {"out": str(out), "blocks": shards - 1, "device": str(self.device)}
            self._log(writer, Event("run", start | {"method": self.method.signature()}))
            self._write_outside(writer)
            with explained(out):
                self._blocks(writer, windows)
            writer.clear_streams()
            self._finish(writer, windows)
            self._log(writer, Event("done", {"out": str(out)}))
        return out

    def _start(self) -> Learned | None:
        if self.options.start_from is None:
            return None
        if not self.method.learns:
            raise ValueError(
                f"--start-from needs a method that learns; {self.method.name} does not"
            )
        return Learned(self.options.start_from, 1 + len(self.source.block_names))

    def _windows(self) -> TokenWindows | None:
        if not self.method.streams():
            return None
        tokenizer = load_tokenizer(self.source.folder, self.options.trust_remote_code)
        context = getattr(self.source.config, "max_position_embeddings", None)
        return token_windows(self.calibration, tokenizer, context, self.options.cache)

    def _signature(self, windows: TokenWindows | None) -> dict[str, Any]:
        config = file_sha256(self.source.folder / "config.json")
        model = hashlib.sha256(f"{config} {self.source.reader.digest()}".encode()).hexdigest()
        return {
            "method": self.method.signature(),
            "model": model,
            "calibration": windows and windows.digest,
            "seed": self.calibration.seed,
            "device": self.device.type,
            "allow_float": list(self.options.allow_float),
            "skip": list(self.options.skip),
            "only": list(self.options.only),
            "lm_head_bits": self.options.lm_head_bits,
            "start_from": self.start and self.start.digest(),
            "recipe": self.options.recipe,
            "versions": {"lowbit": __version__, "torch": torch.__version__},
        }

    def _write_outside(self, writer: CheckpointWriter) -> None:
        """Embeddings, last norm and lm_head, in shard 0."""
        if writer.record(0) is None:
            tensors, record = outside_blocks(self.source, self.options.lm_head_bits)
            writer.write_shard(0, tensors, None, record)

    def _blocks(self, writer: CheckpointWriter, windows: TokenWindows | None) -> None:
        names = self.source.block_names
        unfinished = [i for i in range(len(names)) if writer.record(i + 1) is None]
        if not unfinished:
            return
        streams, kwargs = self._first_streams(writer, windows)
        for i, name in enumerate(names[: unfinished[-1] + 1]):
            record = writer.record(i + 1)
            if record is not None and not streams:
                continue
            block = self.source.load_block(name, self.device)
            for stream in streams.values():
                stream.kwargs = kwargs[i]
            if record is None:
                result = self._quantize_block(writer, i, block, streams)
            else:
                result = result_of(writer.read_shard(i + 1), record, self.source)
                self._log(writer, Event("resumed", {"block": name, "index": i, "of": len(names)}))
            if i < unfinished[-1]:
                self._advance(block, result, streams)

    def _quantize_block(
        self, writer: CheckpointWriter, index: int, block: nn.Module, streams: dict[str, Stream]
    ) -> BlockResult:
        names = self.source.block_names
        name, started = names[index], time.perf_counter()
        place = {"block": name, "index": index, "of": len(names)}
        self._log(writer, Event("block", place))
        task = BlockTask(
            name,
            block,
            self.selection.groups(name),
            self.source.folds(name),
            streams,
            generator_for(self.calibration.seed, name),
            lambda event: self._log(writer, Event(event.kind, place | event.data)),
            self.start.of(index + 1) if self.start else {},
        )
        with PeakMemory(self.device) as peak:
            result = self.method.quantize(task) if task.groups else BlockResult({})
            pack_float_experts(block, result)
            result = as_stored(result, self.source, name)
            first = not any((writer.record(i) or {}).get("modules") for i in range(index + 1))
            tensors, record = shard_of(result, self.source, name, first)
            learned = result.learned if self.method.learns else None
            writer.write_shard(index + 1, tensors, learned, record)
        facts = {
            key: result.report[key] for key in ("loss_rtn", "loss_after") if key in result.report
        }
        seconds = {"seconds": round(time.perf_counter() - started, 3)}
        self._log(writer, Event("finished", place | facts | seconds | peak.found))
        return result

    def _first_streams(
        self, writer: CheckpointWriter, windows: TokenWindows | None
    ) -> tuple[dict[str, Stream], list[list[dict[str, Any]]]]:
        if windows is None:
            return {}, []
        self._log(
            writer, Event("capture", {"samples": len(windows.tokens), "seqlen": windows.seqlen})
        )
        hidden, kwargs = self.source.capture(windows.tokens.split(self.method.rows()))
        names = self.method.streams()
        folder = self._stream_folder(writer, hidden, len(names))
        streams = {
            name: Stream(
                hidden if folder is not None else [h.clone() for h in hidden],
                kwargs[0],
                self.device,
                folder and folder / name,
            )
            for name in names
        }
        return streams, kwargs

    def _advance(self, block: nn.Module, result: BlockResult, streams: dict[str, Stream]) -> None:
        """Every stream through what it must come through; the last one may use up the block."""
        with torch.no_grad():
            for i, (name, stream) in enumerate(streams.items()):
                passed = block if i == len(streams) - 1 else deepcopy(block)
                self.method.install(passed, result, name)
                for number, batch in enumerate(stream):
                    stream.replace(number, call_block(passed, batch))

    def _stream_folder(
        self, writer: CheckpointWriter, hidden: Sequence[Tensor], streams: int
    ) -> Path | None:
        """Where the streams live on disk; None: in memory."""
        # One more for each stream: methods keep their targets beside the inputs.
        needed = 2 * streams * sum(h.nbytes for h in hidden)
        many = needed > MOST_OF_MEMORY * physical_memory()
        if self.options.streams == "memory" or (self.options.streams == "auto" and not many):
            return None
        writer.clear_streams()
        free = shutil.disk_usage(writer.folder).free
        if needed > free:  # a mapped file that outgrows the disk would end the process
            raise ValueError(
                f"the hidden states need {needed:,} bytes on the disk that holds {writer.folder}, "
                f"which has {free:,} left: free some space or use fewer samples"
            )
        return writer.streams

    def _finish(self, writer: CheckpointWriter, windows: TokenWindows | None) -> None:
        for pattern in COMPANIONS + (("*.py",) if self.options.trust_remote_code else ()):
            for path in sorted(self.source.folder.glob(pattern)):
                if path.is_file():
                    writer.copy_file(path)
        records = [writer.record(i) or {} for i in range(writer.shards)]
        names = left_float(self.source, self.selection.left_float)
        writer.write_json("report.json", report_of(records, names))
        made_by = {
            **writer.signature,
            "source": self.name,
            "calibration": windows
            and {
                "sources": windows.sources,
                "samples": len(windows.tokens),
                "seqlen": windows.seqlen,
                "digest": windows.digest,
            },
        }
        writer.finish(final_config(self.source.folder, records, made_by))

    def _log(self, writer: CheckpointWriter, event: Event) -> None:
        writer.append_event({"time": round(time.time(), 3), "kind": event.kind, **event.data})
        self.on_event(event)


def generator_for(seed: int, block: str) -> torch.Generator:
    """Seeded by seed and block alone: a resumed run draws the same numbers."""
    digest = hashlib.sha256(f"{seed} {block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
