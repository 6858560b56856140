"""Write OUT block by block so that a run can die at any moment and go on.

OUT/run/signature.json    what shaped the run: another recipe, model or text may not continue it
OUT/run/streams/          hidden states, where they are too large for memory
OUT/run/NAME.json         one record per finished shard, written after the shard itself
OUT/learned/              what was learned, one file per block
OUT/*.safetensors         one shard for everything outside the blocks, one per block
OUT/events.jsonl          what happened, one JSON object a line, appended
OUT/config.json           written last: an unfinished OUT does not load

Every other file is written aside and renamed. The lock is flock on OUT/run/lock: it falls with its
owner.
"""

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lowbit.checkpoint.reader import INDEX, CheckpointReader, file_sha256, read_json

RUN, SIGNATURE, EVENTS = "run", "signature.json", "events.jsonl"


class CheckpointWriter:
    """OUT while one process writes it; a context manager that holds the lock.

    `signature` is what must be equal for a run to go on. `before`: called ahead of a run that does
    not go on, when nothing in OUT has changed yet; what it raises leaves OUT so. Raises ValueError
    when OUT belongs to a run with another signature (and says what differs), is not ours, or is
    being written.
    """

    def __init__(
        self,
        folder: Path,
        signature: dict[str, Any],
        shards: int,
        restart: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.signature = json.loads(json.dumps(signature))
        self.shards = shards
        self.restart = restart
        self.before = before

    def __enter__(self) -> Self:
        self._refuse_other_folders()
        with explained(self.folder):
            (self.folder / RUN).mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / RUN / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"another process is writing {self.folder}: wait for it, or choose another folder"
            ) from None
        try:
            if self.restart or not (self.folder / RUN / SIGNATURE).exists():
                self.before()
            with explained(self.folder):
                if self.restart:
                    self._clear()
                self._compare_signature()
                self._drop_half_an_event()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()

    @property
    def complete(self) -> bool:
        return (self.folder / "config.json").exists()

    @property
    def streams(self) -> Path:
        """Where hidden states may live while the run goes on."""
        return self.folder / RUN / "streams"

    def clear_streams(self) -> None:
        shutil.rmtree(self.streams, ignore_errors=True)

    def shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def record(self, index: int) -> dict[str, Any] | None:
        """What was recorded with a finished shard, or None: it is not finished."""
        path = self._record_path(index)
        if not path.exists():
            return None
        record = read_json(path)
        shard = self.folder / record["file"]
        if not shard.exists() or shard.stat().st_size != record["size"]:
            return None
        return record

    def write_shard(
        self,
        index: int,
        tensors: dict[str, Tensor],
        learned: dict[str, Tensor] | None,
        data: dict[str, Any],
    ) -> None:
        """Writes one shard, then its record: `data` plus the file's name, size and hash.

        learned: None for a method that learns nothing; then no file says so.
        """
        name = self.shard_name(index)
        with explained(self.folder):
            save_tensors(self.folder / name, tensors)
            if learned is not None:
                (self.folder / "learned").mkdir(exist_ok=True)
                save_tensors(self.folder / "learned" / name, learned)
            path = self.folder / name
            record = {
                "file": name,
                "size": path.stat().st_size,
                "sha256": file_sha256(path),
                "tensors": {key: tensor.nbytes for key, tensor in tensors.items()},
                **data,
            }
            write_json(self._record_path(index), record)

    def read_shard(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished shard; ValueError when its bytes are not those written."""
        record = self.record(index)
        assert record is not None
        path = self.folder / record["file"]
        if file_sha256(path) != record["sha256"]:
            raise ValueError(f"{path} was changed after it was written; start over with --restart")
        reader = CheckpointReader.of_file(path)
        return reader.read(reader.tensors)

    def write_json(self, name: str, value: Any) -> None:
        with explained(self.folder):
            write_json(self.folder / name, finite(value))

    def append_event(self, event: dict[str, Any]) -> None:
        with explained(self.folder), (self.folder / EVENTS).open("a") as file:
            file.write(json.dumps(finite(event)) + "\n")

    def finish(self, config: dict[str, Any]) -> None:
        """Writes the index, then config.json; OUT loads from now on."""
        records = [self.record(index) for index in range(self.shards)]
        assert all(record is not None for record in records)
        placed = {key: r["file"] for r in records if r for key in r["tensors"]}
        total = sum(size for r in records if r for size in r["tensors"].values())
        with explained(self.folder):
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            write_json(self.folder / INDEX, index)
            write_json(self.folder / "config.json", config)

    def _record_path(self, index: int) -> Path:
        return self.folder / RUN / f"{self.shard_name(index).removesuffix('.safetensors')}.json"

    def _refuse_other_folders(self) -> None:
        """--restart deletes; it must never delete somebody else's model."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; OUT must be a folder")
        if not self.folder.is_dir() or (self.folder / RUN / SIGNATURE).is_file():
            return
        # Without a signature it is ours only when it was killed before it wrote one.
        first = {RUN, f"{RUN}/lock", f"{RUN}/{SIGNATURE}.part"}
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))
        if not all(path in first for path in found):
            raise ValueError(
                f"{self.folder} is not empty and was not made by lowbit quantize: "
                "choose another folder, or empty it yourself"
            )

    def _clear(self) -> None:
        """Deletes all but the lock: config.json first, so that half a folder does not load, and the
        signature last, so that the rest is known as ours if this is interrupted."""
        (self.folder / "config.json").unlink(missing_ok=True)
        signature, lock = self.folder / RUN / SIGNATURE, self.folder / RUN / "lock"
        doomed = {*self.folder.iterdir(), *(self.folder / RUN).iterdir()}
        for path in doomed - {self.folder / RUN, signature, lock}:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        signature.unlink(missing_ok=True)

    def _compare_signature(self) -> None:
        path = self.folder / RUN / SIGNATURE
        if not path.exists():
            write_json(path, self.signature)
            return
        differing = dict(differences(read_json(path), self.signature))
        if differing:
            lines = "".join(f"\n  {key}: was {a}, is {b}" for key, (a, b) in differing.items())
            raise ValueError(
                f"{self.folder} holds a run that differs in {', '.join(differing)}; "
                f"--restart starts over, another OUT keeps both:{lines}"
            )

    def _drop_half_an_event(self) -> None:
        """A full disk may have cut the last line."""
        path = self.folder / EVENTS
        if path.exists():
            text = path.read_bytes()
            os.truncate(path, text.rfind(b"\n") + 1)


def differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(key, (before, now)) where two signatures differ; fields of one method one by one."""
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a.get("name") == b.get("name"):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", (a, b)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write what shall be `path`: flushed to the disk and renamed once it is whole."""
    part = path.with_name(path.name + ".part")
    yield part
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    with aside(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with None for inf and nan: a loss can be either, and JSON knows neither."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with aside(path) as part:
        save_file(contiguous, part, metadata={"format": "pt"})
        part.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns a full disk, or a folder that cannot be written, into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):
            raise ValueError(
                f"the disk that holds {folder} is full: free some space and run the same command "
                "again; finished blocks are kept"
            ) from error
        raise ValueError(f"{folder} cannot be written: {error}") from error
