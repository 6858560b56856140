"""The options of adapters and their training. This module does not need peft."""

from typing import Any

from pydantic import Field, field_validator

from lowbit.config import Config


class LoRA(Config):
    """Low-rank adapters on the linears of the blocks, and how they are trained.

    Source: the restorative LoRA of PTQ1.61 (arXiv 2502.13179). The paper's targets leave out the
    output projection of attention: ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    "down_proj"].
    """

    rank: int = Field(64, ge=1, description="Rank of the adapters.")
    alpha: int = Field(
        16, ge=1, description="Numerator of the adapters' scale, which is alpha / rank."
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of the adapters' inputs that is dropped in training."
    )
    targets: tuple[str, ...] = Field(
        ("*",), min_length=1, description="Patterns of the linears that get an adapter."
    )
    sources: tuple[str, ...] = Field(
        ("c4",),
        min_length=1,
        description="Text to train on, data sets or files as for calibration; it is cut into "
        "windows, none of which is used twice.",
    )
    seqlen: int | None = Field(
        None,
        ge=2,
        description="Tokens in a window; None: 2,048, or the model's context if that is shorter.",
    )
    steps: int = Field(10_000, ge=1, description="Steps of the optimiser.")
    batch: int = Field(1, ge=1, description="Windows that are run at a time.")
    accumulate: int = Field(
        2, ge=1, description="Batches whose gradients are added up for one step."
    )
    learning_rate: float = Field(
        1e-4,
        gt=0,
        description="AdamW's highest learning rate, reached after the warm-up; then it falls along "
        "a cosine.",
    )
    warmup: float = Field(
        0.05, ge=0, le=1, description="Share of the steps in which the learning rate rises."
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Whether activations are computed again in the backward pass, which takes less "
        "memory and more time.",
    )
    held_out: int = Field(
        16,
        ge=1,
        description="Windows that are not trained on; the loss on them before and after says "
        "whether training helped.",
    )
    save_every: int = Field(
        500, ge=1, description="Steps between two states that a stopped run can continue from."
    )

    @field_validator("targets", "sources", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def windows(self) -> int:
        """Number of windows of text that are trained on."""
        return self.steps * self.batch * self.accumulate
