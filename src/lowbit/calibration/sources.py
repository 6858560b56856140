"""Where text comes from: named data sets of the Hugging Face hub, and local files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.config import unknown_name

Document = str | list[dict[str, Any]]  # a text, or the messages of one chat
JSON_SUFFIXES = (".json", ".jsonl")
PARQUET_SUFFIX = ".parquet"


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub: what `datasets.load_dataset` is called with, and how rows are used.

    files: the one file that is read of a split; a split that is not in it is read whole.
    evaluation: None where nothing is held out. limit: how many rows are used, from the front.
    windows_in_rows: each row is a whole document, and every window lies inside one of them.
    evaluation_separator: what joins the rows of the evaluation text.
    """

    dataset: str
    revision: str
    config: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    calibration: str = "train"
    evaluation: str | None = "test"
    column: str = "text"
    limit: int | None = None
    windows_in_rows: bool = False
    evaluation_separator: str = "\n\n"


HUB_SOURCES = {
    "wikitext2": HubSource(
        dataset="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        config="wikitext-2-raw-v1",
    ),
    # The repository holds a loading script, which datasets 4 and later refuse: read the hub's own
    # conversion. Joined by a space, as in the literature (49 windows of 2,048 LLaMA tokens).
    "ptb": HubSource(
        dataset="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        files={split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "test")},
        column="sentence",
        evaluation_separator=" ",
    ),
    # Without a config name: with "en" the sizes of the whole set are expected of the one shard.
    "c4": HubSource(
        dataset="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        evaluation="validation",
        windows_in_rows=True,
    ),
    # All 215,000 rows would be 1.3 GB of text to tokenise for a few hundred windows.
    "pile": HubSource(
        dataset="mit-han-lab/pile-val-backup",
        revision="2f5e46ae6a69cf0dce4b12f78241c408936ca0e4",
        files={"validation": "val.jsonl.zst"},
        calibration="validation",
        evaluation=None,
        limit=1000,
    ),
}


@dataclass(frozen=True)
class Corpus:
    """The documents of one source: all texts or all chats, in memory or read on access."""

    name: str
    documents: Sequence[Document]
    separator: str = "\n\n"
    windows_in_rows: bool = False


def calibration_corpus(name: str) -> Corpus:
    """What windows are drawn from. Raises ValueError for a source that cannot be had."""
    source = HUB_SOURCES.get(name)
    if source is None:
        return Corpus(name, read_file(Path(name)))
    rows = _load_rows(name, source, source.calibration)
    return Corpus(name, rows, windows_in_rows=source.windows_in_rows)


def evaluation_corpus(name: str) -> Corpus:
    """What perplexity is measured on. Raises ValueError for a source that cannot be had."""
    held_out = [known for known, source in HUB_SOURCES.items() if source.evaluation]
    check_name(name, held_out, "data set with a held-out split")
    source = HUB_SOURCES.get(name)
    if source is None or source.evaluation is None:
        return Corpus(name, read_file(Path(name)))
    rows = _load_rows(name, source, source.evaluation)
    return Corpus(name, rows, source.evaluation_separator, source.windows_in_rows)


def check_name(name: str, known: Iterable[str], what: str) -> None:
    """Raises ValueError unless `name` is one of the known ones, or a file. Names go first."""
    known = list(known)
    if name in known or Path(name).is_file():
        return
    what += ", and it is a folder" if Path(name).is_dir() else ", and no such file exists"
    raise ValueError(unknown_name(name, known, what) + "; or any text, .jsonl or .parquet file")


def is_text_file(path: Path) -> bool:
    """Whether a file is read as one text: its suffix does not say that it holds rows."""
    return path.suffix.lower() not in (*JSON_SUFFIXES, PARQUET_SUFFIX)


def read_file(path: Path) -> list[Document]:
    """The documents of a file: one for a text file, one per row of a .json, .jsonl or .parquet.

    A row holds `text`, or else `messages`: a chat. Raises ValueError with the file's name, and with
    the row's number (from 1; the line in .jsonl).
    """
    if path.suffix.lower() == PARQUET_SUFFIX:
        return _documents(path, enumerate(_parquet_rows(path), start=1))
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return [text] if is_text_file(path) else _documents(path, _json_rows(path, text))


def _json_rows(path: Path, text: str) -> Iterable[tuple[int, Any]]:
    """The rows of JSON lines, or of one JSON list, with their numbers."""
    if text.lstrip().startswith("["):
        yield from enumerate(_parse_json(str(path), text), start=1)
        return
    # Not splitlines(): U+2028 and the like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse_json(f"{path}, line {number}", line)


def _parse_json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    # Comes with datasets, whose own reader would leave a copy in the user's cache.
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        columns = pyarrow.parquet.read_schema(path).names
        wanted = [name for name in ("text", "messages") if name in columns]
        rows = pyarrow.parquet.read_table(path, columns=wanted or columns).to_pylist()
    except ValueError as error:
        raise ValueError(f"{path} is not a parquet file: {_first_line(error)}") from error
    return rows


def _documents(path: Path, rows: Iterable[tuple[int, Any]]) -> list[Document]:
    """One document per row. All rows must hold the field that the first one does."""
    documents: list[Document] = []
    column = "text or messages"
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is a {type(row).__name__}, not an object")
        if not documents:
            column = next((name for name in ("text", "messages") if name in row), column)
        if column not in row:
            raise ValueError(f"{path}, row {number} has no {column}, but {', '.join(row)}")
        value = row[column]
        if column == "text" and not isinstance(value, str):
            raise ValueError(f"{path}, row {number}: text is a {type(value).__name__}, no string")
        if column == "messages" and not _is_chat(value):
            raise ValueError(f"{path}, row {number}: messages must be a list, each with a role")
        documents.append(value)
    return documents


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, dict) and "role" in message for message in value)


def _load_rows(name: str, source: HubSource, split: str) -> Sequence[str]:
    """The texts of one split, read on access. Raises ValueError when they cannot be had."""
    refusal = f"the data set {name} ({source.dataset}) cannot be had"
    try:
        # Imported here because it takes a second, which a local file does not need.
        import datasets
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        raise ValueError(
            f"{refusal}: {error} (pip install datasets); name a local file in its place"
        ) from error
    file = source.files.get(split)
    try:
        rows = datasets.load_dataset(
            source.dataset,
            source.config,
            data_files=None if file is None else {split: file},
            split=split,
            revision=source.revision,
        )
    # ValueError: a config or compression it does not know; RuntimeError: a loading script;
    # ImportError: zstandard, which pile needs; the rest: network, hub, and the data itself.
    except (
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
        HTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:
        wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
        reason = _first_line(wrapped or error)
        raise ValueError(f"{refusal}: {reason}; name a local file in its place") from error
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    return rows[source.column]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
