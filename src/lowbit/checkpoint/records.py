"""Records of finished shards, OUT/run/NAME.json, which say what an earlier run has done.

A record is not trusted: it counts only if it is whole, belongs to this run, and its shard is what
was written. The digest in it covers everything else in it.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowbit.checkpoint.hashes import problem_of
from lowbit.checkpoint.reader import read_header, read_json
from lowbit.config import explain

Record = dict[str, Any]
_Size = Annotated[int, Field(ge=0)]


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    size: _Size
    sha256: str


class _Layout(BaseModel):
    """The fields of a record.

    file, size, sha256: the shard.
    tensors: bytes of each tensor in it, by name on disk.
    learned: size and hash of the block's learned parameters; None: it has none.
    run: digest of the signature of the run.
    digest: of the record without this field.
    The others are the `data` of `CheckpointWriter.write_shard`.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    file: str
    size: _Size
    sha256: str
    tensors: dict[str, _Size]
    learned: _File | None
    run: str
    digest: str
    block: str = ""
    on_disk: str = ""
    modules: dict[str, dict[str, Any]] = {}
    attention: dict[str, dict[str, Any]] = {}
    changed: list[str] = []
    marker: str | None = None
    config: dict[str, Any] = {}
    report: dict[str, Any] = {}


def digest_of(value: Any) -> str:
    """Returns a sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(record: Record) -> Record:
    """Returns a record with its digest, as it is when it is read."""
    record = json.loads(json.dumps(record))
    return {**record, "digest": digest_of(record)}


def read_record(path: Path, file: str, run: str) -> Record:
    """Reads a record, and compares its shard with it.

    path: the record, in the folder `run` of OUT.
    file: the name of the shard that it must be about.
    run: the digest of the signature that the run must have.

    Raises ValueError that says, as the rest of a sentence that begins with a file's name, why the
    shard is not finished.
    """
    folder, name = path.parent.parent, f"{path.parent.name}/{path.name}"
    try:
        record = read_json(path)
        _Layout.model_validate(record)
    except ValidationError as error:
        raise ValueError(f"{name} is no record of a shard: {explain(error)}") from None
    except ValueError:
        raise ValueError(f"{name} cannot be read as JSON") from None
    if sealed({k: v for k, v in record.items() if k != "digest"}) != record:
        raise ValueError(f"{name} was changed after it was written")
    if record["run"] != run or record["file"] != file:
        raise ValueError(f"{name} belongs to another run or shard")
    learned = f"learned/{file}"
    if record["learned"] is None and (folder / learned).exists():
        raise ValueError(f"{name} does not state {learned}")
    for each, facts in ((file, record), (learned, record["learned"])):
        problem = None if facts is None else problem_of(folder, each, facts)
        if problem is not None:
            raise ValueError(f"{each} {problem}")
    if {key: info.bytes for key, info in read_header(folder / file).items()} != record["tensors"]:
        raise ValueError(f"{file} has other tensors than {name} states")
    return record


def differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yields (key, (before, now)) for each key in which two signatures differ.

    Two methods of the same name are compared field by field, others by their names.
    """
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a.get("name") == b.get("name"):
            yield from differences(a, b, f"{prefix}{key}.")
        elif isinstance(a, dict) and isinstance(b, dict) and "name" in a and "name" in b:
            yield f"{prefix}{key}", (a["name"], b["name"])
        elif a != b:
            yield f"{prefix}{key}", (a, b)
