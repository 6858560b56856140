"""Low-rank adapters on the linears of the blocks: trained by transformers' Trainer, then merged."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import LoraConfig, get_peft_model
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from lowbit.blocks import Event
from lowbit.config import Config
from lowbit.patterns import matches_any

Log = Callable[[Event], None]


class LoRA(Config):
    """rank, alpha, dropout: of the adapters. targets: patterns of the linears that get one.

    The published set leaves out the output projection of attention: ["q_proj", "k_proj", "v_proj",
    "gate_proj", "up_proj", "down_proj"]. sources, seqlen: the text, in windows cut anywhere
    (packed), none of them twice. steps: optimiser updates of `batch` times `accumulate` windows.
    learning_rate: of AdamW, at the end of a warm-up over the share `warmup` of all steps, then down
    a cosine. save_every: steps between two states that a stopped run can go on from.
    """

    rank: int = Field(64, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    targets: tuple[str, ...] = Field(("*",), min_length=1)
    sources: tuple[str, ...] = Field(("c4",), min_length=1)
    seqlen: int = Field(2048, ge=2)
    steps: int = Field(10_000, ge=1)
    batch: int = Field(1, ge=1)
    accumulate: int = Field(2, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    gradient_checkpointing: bool = True
    save_every: int = Field(500, ge=1)

    @property
    def windows(self) -> int:
        """How many windows of text are read."""
        return self.steps * self.batch * self.accumulate


def train(
    model: PreTrainedModel,
    linears: Sequence[str],
    windows: Tensor,
    lora: LoRA,
    state: Path,
    seed: int,
    log: Log,
) -> dict[str, Any]:
    """Trains adapters on `linears` and merges them into the model, in place; says what it saw.

    windows: (windows, tokens) int64. state: a folder of this run alone, from whose last state it
    goes on; Trainer reads it with weights_only. Raises ValueError when no linear is a target, or
    the loss is not finite.
    """
    targets = [name for name in linears if matches_any(name, lora.targets)]
    if not targets:
        raise ValueError(
            f"targets {', '.join(lora.targets)} match no linear of this model: {linears[0]}, ..."
        )
    adapters = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )
    progress = _Progress(lora.steps, log)
    last = get_last_checkpoint(str(state)) if state.exists() else None
    with _own_seed(seed):
        adapted = get_peft_model(model, adapters)
        trained = adapted.get_nb_trainable_parameters()[0]
        adapted.enable_input_require_grads()
        trainer = Trainer(
            model=adapted,
            args=_arguments(model, lora, state, seed),
            train_dataset=[{"input_ids": row, "labels": row} for row in windows],
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last)
    adapted.merge_and_unload()
    return {
        "linears": len(targets),
        "trained_parameters": trained,
        "steps": lora.steps,
        "learning_rate": lora.learning_rate,
        "tokens_seen": windows.numel(),
        "packed": True,
        "loss": [round(value, 5) for value in progress.losses],
    }


@contextmanager
def _own_seed(seed: int) -> Iterator[None]:
    """peft and Trainer draw from the global generators: they are seeded here, and then restored."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])


def _arguments(model: nn.Module, lora: LoRA, state: Path, seed: int) -> TrainingArguments:
    device = next(model.parameters()).device
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return TrainingArguments(
        output_dir=str(state),
        max_steps=lora.steps,
        per_device_train_batch_size=lora.batch,
        gradient_accumulation_steps=lora.accumulate,
        gradient_checkpointing=lora.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=lora.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(lora.warmup * lora.steps),
        optim="adamw_torch",
        bf16=bf16,
        seed=seed,
        save_steps=lora.save_every,
        save_total_limit=2,
        logging_steps=max(1, lora.steps // 100),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=0,
    )


class _Progress(TrainerCallback):
    """Trainer's log as events."""

    def __init__(self, steps: int, log: Log) -> None:
        self.steps = steps
        self.log = log
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at step {state.global_step}: lower the learning rate"
                )
            self.losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
            facts = {"step": state.global_step, "of": self.steps, "loss": loss}
            self.log(Event("step", facts))
