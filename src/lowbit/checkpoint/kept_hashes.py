"""Hashes the shards of a model in several threads, and keeps the hashes for later runs.

A hash is kept under the path, size, time of change and inode of its file, and under the names of
the tensors whose values were checked.
"""

import hashlib
import json
import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from lowbit.checkpoint.finite import checked_sha256
from lowbit.parsing import parse_json, read_text

THREADS = 4  # hashing lets go of the interpreter's lock; 1.8 GB/s on each core, as fast as a disk
SETTLED = 2.0  # seconds since a file was changed; younger files may change unnoticed


def sha256_of_files(
    folder: Path, files: Sequence[str], names: Collection[str] | None, cache: Path | None
) -> dict[str, str]:
    """Returns the sha256 of safetensors files, by name.

    names: the tensors whose values are checked; None: all.
    cache: the folder that keeps hashes; None: they are not kept.

    Raises ValueError, with the tensor and the file, for a value that is NaN or infinite.
    """

    checked = None if names is None else sorted(names)

    def of_file(name: str) -> str:
        path = folder / name
        kept = None if cache is None else cache / f"{_key(path, checked)}.sha256.json"
        found = _read(kept)
        if found is None:
            found = checked_sha256(path, names)
            _keep(kept, path, found)
        return found

    pool = ThreadPoolExecutor(min(THREADS, len(files)), "hashes", _start)
    try:
        return dict(zip(files, pool.map(of_file, files), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error the other files do not matter


def _start() -> None:
    torch.set_num_threads(1)  # of this thread: the check of values shares the cores with the others


def _key(path: Path, checked: list[str] | None) -> str:
    stat = path.stat()
    facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino, checked]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read(kept: Path | None) -> str | None:
    """Returns a hash that was kept; None if there is none, or if its file is damaged."""
    if kept is None or not kept.is_file():
        return None
    with suppress(ValueError, OSError):
        found = parse_json(read_text(kept), str(kept))
        if isinstance(found, dict) and isinstance(found.get("sha256"), str):
            digest: str = found["sha256"]
            return digest if len(digest) == hashlib.sha256().digest_size * 2 else None
    return None


def _keep(kept: Path | None, path: Path, digest: str) -> None:
    if kept is None or time.time() - path.stat().st_mtime < SETTLED:
        return
    with suppress(OSError):  # a cache that cannot be written costs time, and nothing else
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f"{kept.name}.{os.getpid()}")
        try:
            aside.write_text(json.dumps({"sha256": digest}))
            aside.replace(kept)
        finally:
            aside.unlink(missing_ok=True)
