"""Options and scores of zero-shot tasks; lm-eval, which is slow to import, is not needed here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

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
    batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        8,
        description='Rows that are run at a time; "auto": as many as fit, which lm-eval tries out.',
    )

    @model_validator(mode="after")
    def _something_is_asked(self) -> "TaskOptions":
        if not self.names and self.folder is None:
            raise ValueError(
                "no task is named: name tasks with --tasks, or a folder of them with --tasks-dir"
            )
        return self


@dataclass(frozen=True)
class TaskScore:
    """The score of one model on one task or group of tasks.

    metrics: acc, acc_norm and whatever else the task defines; accuracies are shares of 1.
    stderr: standard errors of those metrics for which there is a formula.
    rows: number of rows that were scored.
    available: number of rows that the task has.
    few_shot: solved examples before each question.
    cut: how many rows did not fit into the context, and lost their beginning.
    part_of: the requested group that the task belongs to; None: the task itself was requested.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    rows: int
    available: int
    few_shot: int
    cut: int = 0
    part_of: str | None = None
