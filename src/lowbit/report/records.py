"""The JSON files that `lowbit quantize` and `lowbit eval` write, read into classes.

What `lowbit quantize` reports has its classes in `lowbit.run_report` and `lowbit.events`; those of
the other files are here. Unknown keys are passed over: another version may have written them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from lowbit.checkpoint.reader import read_json
from lowbit.checkpoint.writer import finite
from lowbit.config import explain
from lowbit.events import KINDS, Event
from lowbit.run_report import RunReport

Read = TypeVar("Read")


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


@dataclass(frozen=True)
class LoggedEvent:
    """A line of events.jsonl.

    time: when it was written, in seconds since 1970.
    event: None for one of a kind that is not known here, as another version may have.
    """

    time: float
    event: Event | None


class Source(Record):
    name: str
    windows: int | None = None
    tokens: int | None = None
    documents: int | None = None


class CalibrationRecord(Record):
    sources: list[Source] = []
    samples: int | None = None
    seqlen: int | None = None
    digest: str = ""


class MadeBy(Record):
    """Where a folder came from: made_by in config.json. `others`: its other keys."""

    model_config = ConfigDict(extra="allow")

    source: str = ""
    recipe: str | None = None
    method: dict[str, Any] = {}
    calibration: CalibrationRecord | None = None
    seed: int | None = None
    device: str = ""
    model: str = ""
    versions: dict[str, str] = {}

    @property
    def others(self) -> dict[str, Any]:
        return self.model_extra or {}


class DivergenceRecord(Record):
    """kl: in nats a token. agreement: on which share of tokens the likeliest one is the same."""

    kl: float | None = None
    agreement: float | None = None


class TaskRecord(Record):
    metrics: dict[str, float | None] = {}
    stderr: dict[str, float | None] = {}
    rows: int | None = None
    available: int | None = None
    few_shot: int | None = None
    cut: int = 0
    part_of: str | None = None  # of a group of tasks


class ResultRecord(Record):
    """One model in the file that `lowbit eval --json` writes; perplexity, windows and divergence by
    text. A value may be infinite or not a number, or null. `others`: measurements not known here.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    method: str = ""
    perplexity: dict[str, float | None] = {}
    bits_per_weight: dict[str, float | None] = {}
    size_bytes: int | None = None
    seqlen: int | None = None
    windows: dict[str, int] = {}
    per_document: bool = False
    seconds: float | None = None
    reference: str | None = None
    divergence: dict[str, DivergenceRecord] = {}
    tasks: dict[str, TaskRecord] = {}
    tokens: dict[str, str] = {}

    @property
    def others(self) -> dict[str, Any]:
        return self.model_extra or {}


class _Line(Record):
    """What all lines of events.jsonl have."""

    time: FiniteFloat
    kind: str


def parse(kind: type[Read], value: Any, where: Path | str) -> Read:
    """`value` as one of these classes; ValueError that names `where` it stands if it is none."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{where} was edited: {explain(error)}") from None


def read_report(folder: Path) -> RunReport:
    """report.json; empty where there is none, as in a folder that was converted."""
    path = folder / "report.json"
    return parse(RunReport, read_json(path), path) if path.exists() else RunReport()


def read_events(folder: Path) -> list[LoggedEvent]:
    """events.jsonl in order; empty where there is none."""
    path = folder / "events.jsonl"
    if not path.exists():
        return []
    events = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number},"
        try:
            value = finite(json.loads(text))
        except (ValueError, RecursionError):
            raise ValueError(f"{where} cannot be read as JSON") from None
        line = parse(_Line, value, where)
        kind = KINDS.get(line.kind)
        event = None if kind is None else parse(kind, value, where)
        events.append(LoggedEvent(line.time, event))
    return events


def read_results(path: Path) -> list[ResultRecord]:
    """The file of `lowbit eval --json`: one row for each model, in the order of the command."""
    value = read_json(path)
    try:
        return list(TypeAdapter(dict[str, ResultRecord]).validate_python(value).values())
    except ValidationError as error:
        reason = explain(error)
        raise ValueError(f"{path} was not written by lowbit eval --json: {reason}") from None
