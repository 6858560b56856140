"""lowbit preprocess: trains a model so that it loses less when it is quantized."""

import shlex
from dataclasses import replace
from typing import Annotated, Any

from rich.console import Console
from typer import Option

from lowbit.checkpoint.reader import read_json
from lowbit.cli.options import JobOptions, parse_settings, with_job
from lowbit.cli.parameters import Model, NewOut
from lowbit.cli.progress import stoppable_run
from lowbit.cli.screen import change, console
from lowbit.models.locate import locate
from lowbit.preprocess import MARK, LoRA
from lowbit.preprocess import preprocess as run
from lowbit.recipes import load_recipe

PREFIX = "lora."  # of fields of the training in --set


@with_job
def preprocess(
    model: Model,
    out: NewOut,
    job: JobOptions,
    restart: Annotated[
        bool,
        Option("--restart", help="Delete what a stopped run left in OUT.work, and start over."),
    ] = False,
) -> None:
    """Train MODEL so that it loses less when it is quantized.

    MODEL is quantized once, adapters (LoRA) are trained on the result and merged. The whole model
    is in memory. OUT is a float model: quantize it with lowbit quantize. Since this trains, label
    results "after LoRA".

    --calibration is the text of the first quantization. --set changes fields of its method, and of
    the training: lora.sources (the text), lora.steps, lora.learning_rate, lora.rank ...
    """
    settings = parse_settings(job.settings or [])
    trained = {name: value for name, value in settings.items() if name.startswith(PREFIX)}
    rest = [pair for pair in job.settings or [] if not pair.strip().startswith(PREFIX)]
    recipe_fields = load_recipe(job.recipe).lora if job.recipe else None
    own: dict[str, Any] = {name.removeprefix(PREFIX): value for name, value in trained.items()}
    lora = LoRA(**(recipe_fields or {}) | own)
    chosen = replace(job, settings=rest).chosen(
        locate(model, job.trust_remote_code), preprocessing=True, restart=restart
    )
    screen = console()
    screen.print(f"{model} → {out}: {chosen.label}, {lora.steps:,} steps", soft_wrap=True)
    chosen.warn(screen)
    with stoppable_run(screen, "the same command continues") as progress:
        options = dict(chosen.options)
        run(model, out, chosen.method, lora, chosen.calibration, **options, on_event=progress)
    _print_gain(screen, read_json(out / "config.json")[MARK]["training"])
    screen.print(f"next:\n  lowbit quantize {shlex.quote(str(out))} OUT --recipe ptq161")


def _print_gain(screen: Console, training: dict[str, Any]) -> None:
    """Prints the held-out loss of the quantized model before and after training."""
    before, after = training["loss_before"], training["loss_after"]
    seen = f"{training['tokens_seen']:,} tokens, packed, at rate {training['learning_rate']:g}"
    loss = f"held-out loss {before:.3f} → {after:.3f} ({change(after, before)})"
    screen.print(f"trained: {training['linears']:,} linears on {seen}: {loss}", soft_wrap=True)
    if after >= before:
        text = "warning: training did not help: lower lora.learning_rate, or raise lora.steps"
        screen.print(text, style="yellow", soft_wrap=True)
