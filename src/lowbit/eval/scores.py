"""What can be asked of zero-shot tasks, and what comes of it; free of lm-eval, which is slow."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from lowbit.config import Config


class TaskOptions(Config):
    """names: tasks or groups of lm-eval; with `folder`, of local tasks (none: all that are there).

    folder: a folder of FOLDER/TASK/*.jsonl; None: the data comes from the hub. limit: rows of each
    task, from the front. few_shot: solved examples before each question. batch: rows at a time.
    """

    names: tuple[str, ...] = ()
    folder: Path | None = None
    limit: int | None = Field(default=None, ge=1)
    few_shot: int = Field(default=0, ge=0)
    batch: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _something_is_asked(self) -> "TaskOptions":
        if not self.names and self.folder is None:
            raise ValueError("no task is named: name some with --tasks, or local ones' --tasks-dir")
        return self


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one task or group.

    metrics: acc, acc_norm and whatever else the task defines, accuracies as shares of 1. stderr:
    their standard errors, where there is a formula. rows: scored, of `available`. cut: how many of
    them did not fit into the context, and lost their beginning. part_of: the group that was asked
    for, if the task was not asked for by itself.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    rows: int
    available: int
    few_shot: int
    cut: int = 0
    part_of: str | None = None
