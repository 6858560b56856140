"""Quantize a folder block by block; see `quantize`."""

import shutil
import time
from pathlib import Path
from typing import Any

from lowbit.blocks import Event, Stream
from lowbit.calibration import Calibration, TokenWindows
from lowbit.checkpoint import CheckpointWriter
from lowbit.checkpoint.output import final_config, report_of
from lowbit.checkpoint.writer import explained
from lowbit.formats import use_backend
from lowbit.methods import Method
from lowbit.pipeline.job import Job, Log
from lowbit.pipeline.options import RunOptions
from lowbit.pipeline.plan import LONG, estimate, longest
from lowbit.pipeline.results import left_float, result_of

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


@use_backend("reference")  # a run's bytes depend on no compiler and no instruction set
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
    return _Run(Job(model, method, calibration, RunOptions(**options)), on_event).into(Path(out))


class _Run:
    def __init__(self, job: Job, on_event: Log) -> None:
        self.job = job
        self.on_event = on_event
        self.rehearsed: Event | None = None

    def into(self, out: Path) -> Path:
        job, windows = self.job, self.job.windows()
        with CheckpointWriter(
            out,
            job.signature(windows),
            job.shards,
            job.options.restart,
            lambda: self._rehearse(windows),
        ) as writer:
            if writer.complete:
                self._log(writer, Event("complete", {"out": str(out)}))
                return out
            start = {"out": str(out), "blocks": len(job.blocks), "device": str(job.device)}
            self._log(writer, Event("run", start | {"method": job.method.signature()}))
            if self.rehearsed:
                self._log(writer, self.rehearsed)
            if writer.record(0) is None:
                job.write_outside(writer)
            with explained(out):
                self._blocks(writer, windows)
            writer.clear_streams()
            self._finish(writer, windows)
            self._log(writer, Event("done", {"out": str(out)}))
        return out

    def _rehearse(self, windows: TokenWindows | None) -> None:
        """A block and a few windows before a long run: what cannot work fails now."""
        wanted = self.job.options.dry_run_block
        if wanted is False or (wanted is None and longest(self.job, windows) <= LONG):
            return
        self.on_event(Event("rehearsal", {"blocks": len(self.job.blocks)}))
        try:
            found = estimate(self.job, windows)
        except (ValueError, RuntimeError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"the rehearsal failed, and so would the run, which was not begun: {reason}"
            ) from error
        self.rehearsed = Event("rehearsed", found.to_json())

    def _blocks(self, writer: CheckpointWriter, windows: TokenWindows | None) -> None:
        job, names = self.job, self.job.blocks
        unfinished = [i for i in range(len(names)) if writer.record(i + 1) is None]
        if not unfinished:
            return
        streams, kwargs = self._first_streams(writer, windows)
        for i, name in enumerate(names[: unfinished[-1] + 1]):
            record = writer.record(i + 1)
            if record is not None and not streams:
                continue
            block = job.source.load_block(name, job.device)
            for stream in streams.values():
                stream.kwargs = kwargs[i]
            if record is None:
                result = job.quantize_block(writer, i, block, streams, self._logger(writer))
            else:
                result = result_of(writer.read_shard(i + 1), record, job.source)
                self._log(writer, Event("resumed", {"block": name, "index": i, "of": len(names)}))
            if i < unfinished[-1]:
                job.advance(block, result, streams)
            del block, result  # before the next one is loaded

    def _first_streams(
        self, writer: CheckpointWriter, windows: TokenWindows | None
    ) -> tuple[dict[str, Stream], list[list[dict[str, Any]]]]:
        if windows is None:
            return {}, []
        about = {"samples": len(windows.tokens), "seqlen": windows.seqlen}
        self._log(writer, Event("capture", about))
        folder = self._stream_folder(writer, windows)
        return self.job.first_streams(windows.tokens, folder)

    def _stream_folder(self, writer: CheckpointWriter, windows: TokenWindows) -> Path | None:
        """Where the streams live on disk; None: in memory."""
        if not self.job.streams_on_disk(windows.tokens):
            return None
        writer.clear_streams()
        needed = self.job.room_for_streams(windows.tokens)
        free = shutil.disk_usage(writer.folder).free
        if needed > free:  # a mapped file that outgrows the disk would end the process
            raise ValueError(
                f"the hidden states need {needed:,} bytes on the disk that holds {writer.folder}, "
                f"which has {free:,} left: free some space or use fewer samples"
            )
        return writer.streams

    def _finish(self, writer: CheckpointWriter, windows: TokenWindows | None) -> None:
        job = self.job
        for pattern in COMPANIONS + (("*.py",) if job.options.trust_remote_code else ()):
            for path in sorted(job.source.folder.glob(pattern)):
                if path.is_file():
                    writer.copy_file(path)
        records = [writer.record(i) or {} for i in range(writer.shards)]
        names = left_float(job.source, job.selection.left_float)
        writer.write_json("report.json", report_of(records, names))
        made_by = {
            **writer.signature,
            "source": job.name,
            "calibration": windows
            and {
                "sources": windows.sources,
                "samples": len(windows.tokens),
                "seqlen": windows.seqlen,
                "digest": windows.digest,
            },
        }
        writer.finish(final_config(job.source.folder, records, made_by))

    def _logger(self, writer: CheckpointWriter) -> Log:
        return lambda event: self._log(writer, event)

    def _log(self, writer: CheckpointWriter, event: Event) -> None:
        writer.append_event({"time": round(time.time(), 3), "kind": event.kind, **event.data})
        self.on_event(event)
