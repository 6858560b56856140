"""Reads zero-shot tasks from local files: FOLDER/TASK/*.jsonl.

local/TASK.yaml tells lm-eval how to ask a row, with the same prompt as lm-eval's own task of that
name. This module reads and checks the rows, whose fields differ even within one task. The rows may
be a part of the data set or another split, so results are called local_TASK.

If there are files of several splits, test*.jsonl is scored, or else validation*.jsonl. Solved
examples come from train*.jsonl, or else validation*.jsonl, or else from the scored rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lowbit.config import unknown_name
from lowbit.parsing import parse_json_lines, read_text

PREFIX = "local_"
Row = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """How the rows of a task are read.

    fields: names of the fields of a row, for messages.
    read: converts a row to the fields that the task's YAML file uses.
    """

    fields: str
    read: Callable[[Row], Row]


@dataclass(frozen=True)
class LocalRows:
    """The rows of one task, as converted by `LocalTask.read`.

    task: its name, without "local_".
    scored: the rows that are scored.
    examples: the rows that solved examples come from; `scored` itself if there is no other split.
    """

    task: str
    scored: list[Row]
    examples: list[Row]

    def check(self, few_shot: int) -> None:
        """Raises ValueError if there are fewer examples than `few_shot`."""
        others = len(self.examples) - (self.examples is self.scored)
        if few_shot > others:
            raise ValueError(
                f"--few-shot {few_shot} needs {few_shot} examples, but {self.task} has only "
                f"{others}: lower --few-shot, or put {few_shot} or more rows into "
                f"{self.task}/train.jsonl"
            )


def task_config(name: str) -> dict[str, Any]:
    """Reads local/NAME.yaml: lm-eval's configuration of the task, without rows."""
    text = (resources.files(__package__) / "local" / f"{name}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def find_rows(folder: Path, names: Iterable[str]) -> list[LocalRows]:
    """Reads the rows of tasks.

    folder: holds TASK/*.jsonl.
    names: tasks, with or without "local_"; empty: all that the folder has.

    Raises ValueError for a task that is unknown or not in the folder, and for a row that does not
    fit its task, with file and line.
    """
    present = [name for name in LOCAL_TASKS if any((folder / name).glob("*.jsonl"))]
    if not present:
        raise ValueError(
            f"{folder} holds no tasks: it must have TASK/*.jsonl, where TASK is one of "
            + ", ".join(LOCAL_TASKS)
        )
    wanted = [name.removeprefix(PREFIX) for name in names] or present
    for name in wanted:
        if name not in LOCAL_TASKS:
            raise ValueError(unknown_name(name, present, "local task"))
        if name not in present:
            others = ", ".join(present)
            raise ValueError(f"{folder / name} has no .jsonl file; {folder} has {others}")
    return [_rows_of(name, folder / name) for name in dict.fromkeys(wanted)]


def _rows_of(name: str, folder: Path) -> LocalRows:
    files = sorted(folder.glob("*.jsonl"))
    splits = {
        s: [f for f in files if f.name.startswith(s)] for s in ("train", "validation", "test")
    }
    scored = (
        splits["test"] or splits["validation"] or [f for f in files if f not in splits["train"]]
    )
    if not scored:
        raise ValueError(f"{folder} has only training rows: add test.jsonl or validation.jsonl")
    examples = splits["train"] or splits["validation"] or scored
    rows = _read(name, scored)
    return LocalRows(name, rows, rows if examples == scored else _read(name, examples))


def _read(name: str, files: Iterable[Path]) -> list[Row]:
    task = LOCAL_TASKS[name]
    rows = []
    for file in files:
        for number, row in parse_json_lines(read_text(file), str(file)):
            try:
                rows.append(task.read(row))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise ValueError(
                    f"{file}, line {number} is not a row of {name}: it must be an object with "
                    f"{task.fields}, but {_reason(error)}"
                ) from None
    if not rows:
        raise ValueError(f"{name} has no rows in {', '.join(str(file) for file in files)}")
    return rows


def _reason(error: Exception) -> str:
    """Says why a row cannot be read, in the words of the `ValueError` if it is one of ours."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    if isinstance(error, ValueError):
        return str(error)
    return f"a value is of the wrong kind: {error}"


def _index(field: str, answer: Any, allowed: Sequence[Any]) -> int:
    """Returns the index of the right answer. field: in which it is named, for the message."""
    if answer not in allowed:
        raise ValueError(f"{field} is {answer!r}, allowed are {', '.join(map(repr, allowed))}")
    return allowed.index(answer)


def _question(query: str, choices: list[str], gold: int) -> Row:
    """Returns a row with a question, its answers, and the index of the right one."""
    if not choices:
        raise ValueError("there are no choices")
    for text in (query, *choices):
        if not isinstance(text, str) or not text:
            raise ValueError(f"the question or a choice is {text!r}, which is no text")
    if gold not in range(len(choices)):
        raise ValueError(
            f"the right answer is {gold!r}, but there are only {len(choices)} choices, numbered "
            "from 0"
        )
    return {"query": query, "choices": choices, "gold": int(gold)}


def _arc(row: Row) -> Row:
    if "query" in row:
        return _question(row["query"], row["choices"], row["gold"])
    gold = _index("answerKey", row["answerKey"], row["choices"]["label"])
    return _question(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold)


def _boolq(row: Row) -> Row:
    query = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return _question(query, ["no", "yes"], _index("answer", row["answer"], (False, True)))


def _hellaswag(row: Row) -> Row:
    return _question(row["query"], row["choices"], row["gold"])


def _piqa(row: Row) -> Row:
    query = f"Question: {row['goal']}\nAnswer:"
    return _question(query, [row["sol1"], row["sol2"]], row["label"])


def _winogrande(row: Row) -> Row:
    """Returns a row with one end of a sentence and two beginnings to choose from."""
    before, _, behind = row["sentence"].partition("_")
    beginnings = [before + row["option1"], before + row["option2"]]
    gold = _index("answer", row["answer"], ("1", "2"))
    made = _question(behind.strip(), beginnings, gold)
    return {"choices": made["choices"], "gold": made["gold"], "continuation": made["query"]}


def _lambada(row: Row) -> Row:
    for field in ("context", "continuation"):
        if not row[field].strip():
            raise ValueError(f"{field} is empty")
    return {"context": row["context"], "continuation": f" {row['continuation'].strip()}"}


ARC = "question, choices {text, label} and answerKey, or query, choices and gold"
LOCAL_TASKS = {
    "arc_challenge": LocalTask(ARC, _arc),
    "arc_easy": LocalTask(ARC, _arc),
    "boolq": LocalTask("question, passage and answer (true or false)", _boolq),
    "hellaswag": LocalTask("query, choices and gold", _hellaswag),
    "lambada_openai": LocalTask("context and continuation", _lambada),
    "piqa": LocalTask("goal, sol1, sol2 and label (0 or 1)", _piqa),
    "winogrande": LocalTask(
        'sentence (with a "_"), option1, option2 and answer ("1" or "2")', _winogrande
    ),
}
