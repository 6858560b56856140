"""Write OUT block by block so that a run can die at any moment and go on.

OUT/run/signature.json    what shaped the run: another recipe, model or text may not continue it
OUT/run/NAME.json         one record per finished shard, written after the shard itself
OUT/learned/              what was learned, one file per block
OUT/*.safetensors         one shard for everything outside the blocks, one per block
OUT/config.json           written last: an unfinished OUT does not load

Every file is written aside and renamed. The lock is flock on OUT/run/lock: it falls with its owner.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.torch import save_file
from torch import Tensor

from lowbit.checkpoint.reader import INDEX, CheckpointReader, file_sha256, read_json

RUN = "run"


class CheckpointWriter:
    """OUT while one process writes it; a context manager that holds the lock.

    `signature` is what must be equal for a run to go on. Raises ValueError when OUT belongs to a
    run with another signature (and says what differs), is not ours, or is being written.
    """

    def __init__(
        self, folder: Path, signature: dict[str, Any], shards: int, restart: bool = False
    ) -> None:
        self.folder = folder
        self.signature = json.loads(json.dumps(signature))
        self.shards = shards
        self.restart = restart

    def __enter__(self) -> Self:
        self._refuse_strangers()
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
            if self.restart:
                self._clear()
            self._compare_signature()
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
        learned: dict[str, Tensor],
        data: dict[str, Any],
    ) -> None:
        """Writes one shard, then its record: `data` plus the file's name, size and hash."""
        name = self.shard_name(index)
        with explained(self.folder):
            _save(self.folder / name, tensors)
            if learned:
                (self.folder / "learned").mkdir(exist_ok=True)
                _save(self.folder / "learned" / name, learned)
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
        """The tensors of a finished shard; ValueError when its bytes are no longer those written."""
        record = self.record(index)
        assert record is not None
        path = self.folder / record["file"]
        if file_sha256(path) != record["sha256"]:
            raise ValueError(f"{path} was changed after it was written; start over with --restart")
        reader = CheckpointReader.of_file(path)
        return reader.read(reader.tensors)

    def write_json(self, name: str, value: Any) -> None:
        with explained(self.folder):
            write_json(self.folder / name, value)

    def copy_file(self, path: Path) -> None:
        """A companion of the weights, under its own name."""
        with explained(self.folder):
            shutil.copyfile(path, self.folder / path.name)

    def append_event(self, event: dict[str, Any]) -> None:
        with explained(self.folder), (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")

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

    def _refuse_strangers(self) -> None:
        """--restart deletes; it must never delete somebody else's model."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; OUT must be a folder")
        strange = self.folder.is_dir() and any(self.folder.iterdir())
        if strange and not (self.folder / RUN).is_dir():
            raise ValueError(
                f"{self.folder} is not empty and was not made by lowbit quantize: "
                "choose another folder, or empty it yourself"
            )

    def _clear(self) -> None:
        (self.folder / "config.json").unlink(missing_ok=True)  # first: half a folder must not load
        for path in self.folder.iterdir():
            if path.name == RUN:
                doomed = [inner for inner in path.iterdir() if inner.name != "lock"]
            else:
                doomed = [path]
            for entry in doomed:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _compare_signature(self) -> None:
        path = self.folder / RUN / "signature.json"
        if not path.exists():
            with explained(self.folder):
                write_json(path, self.signature)
            return
        before = read_json(path)
        keys = sorted(before.keys() | self.signature.keys())
        differing = [key for key in keys if before.get(key) != self.signature.get(key)]
        if differing:
            lines = "".join(
                f"\n  {key}: was {before.get(key)}, is {self.signature.get(key)}"
                for key in differing
            )
            raise ValueError(
                f"{self.folder} holds a run that differs in {', '.join(differing)}; "
                f"--restart starts over, another OUT keeps both:{lines}"
            )


def write_text(path: Path, content: str) -> None:
    """Writes aside, flushes to the disk and renames."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    aside = path.with_name(path.name + ".part")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, aside, metadata={"format": "pt"})
    aside.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns a full disk into a sentence; what was finished stays."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):
            raise ValueError(
                f"the disk that holds {folder} is full: free some space and run the same command "
                "again; finished blocks are kept"
            ) from error
        raise
