"""The options of an evaluation."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lowbit.config import Config
from lowbit.eval.scores import TaskOptions


class EvalOptions(Config):
    """What `evaluate` measures, and on which texts and tasks."""

    texts: tuple[str, ...] = Field(
        ("wikitext2",),
        description="Texts for perplexity: wikitext2, c4, ptb or files; empty: perplexity is not "
        "measured.",
    )
    seqlen: int | None = Field(
        None,
        ge=2,
        description="Tokens in a window; None: 2,048, or the model's context if that is shorter.",
    )
    per_document: bool = Field(
        False,
        description="Whether each document of a text is scored alone, from its first token on, "
        "instead of windows over all of them.",
    )
    limit: int | None = Field(
        None, ge=1, description="Windows, or documents, of each text, from the first on; None: all."
    )
    reference: str | None = Field(
        None,
        description="Float model, a folder or hub id, to compare predictions with: KL(reference || "
        "model) is measured for every model; None: it is not measured.",
    )
    tasks: TaskOptions | None = Field(None, description="Tasks to score; None: no tasks.")
    bits: tuple[int | str, ...] = Field(
        (),
        description="Widths of 2 to 8, or paths of YAML plans, at each of which a folder of "
        "MatQuant is measured; other models are measured as they are.",
    )
    device_map: Any = Field(
        None, description="Where models are loaded, as transformers takes it; None: on the CPU."
    )
    trust_remote_code: bool = Field(
        False, description="Whether Python code that comes with a model may be run."
    )
    batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description='Windows that are run at a time, unless there is a reference; "auto": as many '
        "as a quarter of the free memory holds; a perplexity may differ in its last digits.",
    )
    workers: int = Field(
        1,
        ge=1,
        description="Processes that measure models at the same time, each one model; on GPUs, each "
        "on its own.",
    )
    engine: Literal["lowbit", "vllm"] = Field(
        "lowbit",
        description='What runs the models: "lowbit", with transformers, or "vllm", for float '
        "models and for folders that were exported for it.",
    )

    @field_validator("texts", "reference", "bits", mode="before")
    @classmethod
    def _paths_as_text(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(cls._paths_as_text(each) for each in value)
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _something_is_measured(self) -> "EvalOptions":
        if not self.texts and self.tasks is None:
            raise ValueError("there is nothing to measure: name a text or tasks")
        if not self.texts and self.reference is not None:
            raise ValueError("the divergence from a reference is measured on a text: name a text")
        if self.engine == "vllm" and (self.reference or self.tasks or self.bits):
            raise ValueError(
                "with engine vllm only perplexity is measured: leave out the reference, the tasks "
                "and bits, or measure them with engine lowbit"
            )
        if self.engine == "vllm" and self.workers > 1:
            raise ValueError("vllm takes all GPUs for one model: leave out workers")
        return self
