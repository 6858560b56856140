"""What can be asked of zero-shot tasks, and what comes of it; free of lm-eval, which is slow."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from lowbit.config import Config


class TaskOptions(Config):
    """Zero-shot and few-shot tasks, scored by lm-eval."""

    names: tuple[str, ...] = Field(
        (),
        description="Names of tasks or groups of lm-eval; with a folder: of tasks in it, and empty "
        "for all of them.",
    )
    folder: Path | None = Field(
        None,
        description="Folder that holds the rows as TASK/*.jsonl; None: lm-eval takes them from the "
        "hub.",
    )
    limit: int | None = Field(
        None, ge=1, description="Rows of each task, from the first on; None: all."
    )
    few_shot: int = Field(0, ge=0, description="Solved examples before each question.")
    batch: int = Field(8, ge=1, description="Rows that are run at a time.")

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
