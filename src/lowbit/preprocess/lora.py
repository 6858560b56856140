"""Trains low-rank adapters on the linears of the blocks with Trainer, and merges them."""

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import is_torch_bf16_gpu_available

from lowbit.checkpoint.kept import keep, last_kept
from lowbit.events import OnEvent, TrainingStep
from lowbit.patterns import matches_any
from lowbit.preprocess.options import LoRA


def train(
    model: PreTrainedModel,
    linears: Sequence[str],
    windows: Tensor,
    held_out: Tensor,
    lora: LoRA,
    state: Path,
    seed: int,
    log: OnEvent,
) -> dict[str, Any]:
    """Trains adapters and merges them into the model, in place.

    model: the float model.
    linears: names of the linears that may get an adapter.
    windows: (windows, tokens) int64, the text to train on.
    held_out: (windows, tokens) int64, the text on which the loss is measured.
    lora: the settings.
    state: folder of this run alone. Training continues from its last complete state, which Trainer
        reads with weights_only.
    seed: seed of the adapters' initial values, dropout and the order of windows.
    log: called with each `TrainingStep`.

    Returns numbers for config.json: sizes, settings, and losses before, during and after training.
    Raises ValueError if no linear matches lora.targets, or if the loss is not finite.
    """
    targets = [name for name in linears if matches_any(name, lora.targets)]
    if not targets:
        raise ValueError(
            f"lora.targets {', '.join(lora.targets)} match no linear of this model, such as "
            f"{linears[0]}"
        )
    adapters = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )
    before = mean_loss(model, held_out)
    if lora.gradient_checkpointing:
        with warnings.catch_warnings():
            # Every transformers 5 knows this method; later versions prefer another name for it.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    with _own_seed(seed):
        adapted = get_peft_model(_Anonymous(model), adapters)
        trained = adapted.get_nb_trainable_parameters()[0]
        trainer = Trainer(
            model=adapted,
            args=_arguments(model, lora, state, seed),
            train_dataset=[{"input_ids": row, "labels": row} for row in windows],
            callbacks=[_Progress(lora.steps, log)],
        )
        trainer.remove_callback(PrinterCallback)
        last = last_kept(state)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    linears_adapted = sum(isinstance(module, LoraLayer) for module in adapted.modules())
    adapted.merge_and_unload()
    after = mean_loss(model, held_out)
    _check_finite(after, lora.steps)
    return {
        "linears": linears_adapted,
        "trained_parameters": trained,
        "steps": lora.steps,
        "learning_rate": lora.learning_rate,
        "tokens_seen": windows.numel(),
        "packed": True,
        "held_out_tokens": held_out.numel(),
        "loss_before": before,
        "loss_after": after,
        "loss": [round(e["loss"], 5) for e in trainer.state.log_history if "loss" in e],
    }


class _Anonymous(nn.Module):
    """Hides a model's config from peft.

    If peft knows that transformers fuses the experts of such a model, it puts adapters only on
    fused matrices. Ours are unfused, and would get none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.model(input_ids=input_ids, labels=labels)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: Tensor) -> float:
    """Computes the mean next-token loss without dropout; the model stays in eval mode.

    windows: (windows, tokens) int64
    """
    model.eval()
    device = next(model.parameters()).device
    rows = windows.to(device).split(1)
    return sum(float(model(input_ids=row, labels=row).loss) for row in rows) / len(rows)


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: lower lora.learning_rate")


@contextmanager
def _own_seed(seed: int) -> Iterator[None]:
    """Seeds the global generators, which peft and Trainer use, and restores them afterwards."""
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _arguments(model: nn.Module, lora: LoRA, state: Path, seed: int) -> TrainingArguments:
    device = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(state),
        max_steps=lora.steps,
        per_device_train_batch_size=lora.batch,
        gradient_accumulation_steps=lora.accumulate,
        learning_rate=lora.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(lora.warmup * lora.steps),
        optim="adamw_torch",
        bf16=device.type != "cpu" and is_torch_bf16_gpu_available(),
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
    if arguments.device.type != device.type:  # accelerate does not know the type
        raise ValueError(
            f"Trainer would compute on {arguments.device} instead of {device}: set the environment "
            f"variable ACCELERATE_TORCH_DEVICE={device}, or use --device cpu"
        )
    # Trainer would use all GPUs, and read as many times the windows.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _Progress(TrainerCallback):
    """Turns the log of Trainer into events, and keeps the hashes of its states."""

    def __init__(self, steps: int, log: OnEvent) -> None:
        self.steps = steps
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            _check_finite(loss, state.global_step)
            self.log(TrainingStep(step=state.global_step, of=self.steps, loss=loss))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        keep(Path(args.output_dir) / f"checkpoint-{state.global_step}")
