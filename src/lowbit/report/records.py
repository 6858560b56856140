"""What `lowbit quantize` and `lowbit eval` write as JSON, as far as the report shows it.

Unknown keys are passed over: methods and measurements may say more than is shown here.
"""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from lowbit.checkpoint.reader import read_json
from lowbit.config import explain

Model = TypeVar("Model", bound=BaseModel)
Name = Annotated[str, Field(max_length=10_000)]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class LinearRecord(Record):
    """signal_to_noise_db: null is infinite, an exact copy; absent is not known. slices_db: the same
    by the bits that are read of a nested format.
    """

    signal_to_noise_db: FiniteFloat | None = None
    proxy_loss: FiniteFloat | None = None
    slices_db: dict[str, FiniteFloat | None] = {}

    @property
    def exact(self) -> bool:
        known = "signal_to_noise_db" in self.model_fields_set
        return known and self.signal_to_noise_db is None


class Training(Record):
    before: FiniteFloat | None = None
    best_epoch: int | None = None
    failures: list[str] = []


class BlockRecord(Record):
    linears: dict[str, LinearRecord] = {}
    training: Training = Training()
    loss_rtn: FiniteFloat | None = None
    loss_before: FiniteFloat | None = None
    loss_after: FiniteFloat | None = None


class RunRecord(Record):
    """report.json. All names are those on disk; linears are relative to their block."""

    given_up: dict[Name, str] = {}
    left_float: list[Name] = []
    blocks: dict[Name, BlockRecord] = {}


class EventRecord(Record):
    """One line of events.jsonl."""

    kind: str
    time: FiniteFloat
    index: int | None = None  # of a block
    block: str | None = None
    epoch: int | None = None
    loss: FiniteFloat | None = None
    text: str | None = None
    seconds: FiniteFloat | None = None
    memory: int | None = None
    device_memory: int | None = None


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
    """Where a folder came from: made_by in config.json. `others`: what else it says."""

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


def parse(kind: type[Model], value: Any, where: Path | str) -> Model:
    """`value` as a record; ValueError that names `where` it stands when it is none."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{where} was edited: {explain(error)}") from None


def read_report(folder: Path) -> RunRecord:
    """report.json; empty where there is none, as in a folder that was converted."""
    path = folder / "report.json"
    return parse(RunRecord, read_json(path), path) if path.exists() else RunRecord()


def read_events(folder: Path) -> list[EventRecord]:
    """events.jsonl in order; empty where there is none."""
    path = folder / "events.jsonl"
    if not path.exists():
        return []
    events = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number},"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where} cannot be read as JSON") from None
        events.append(parse(EventRecord, value, where))
    return events


def read_results(path: Path) -> list[ResultRecord]:
    """The file of `lowbit eval --json`: one row for each model, in the order of the command."""
    value = read_json(path)
    try:
        return list(TypeAdapter(dict[str, ResultRecord]).validate_python(value).values())
    except ValidationError as error:
        said = explain(error)
        raise ValueError(f"{path} was not written by lowbit eval --json: {said}") from None
