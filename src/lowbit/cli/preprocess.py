"""lowbit preprocess: train a model to where it quantizes well, folder to folder."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Option

from lowbit.checkpoint.reader import read_json
from lowbit.cli.options import JobOptions, parse_settings, with_job
from lowbit.cli.progress import stoppable_run
from lowbit.cli.screen import change, console
from lowbit.models.locate import locate
from lowbit.recipes import load_recipe

PREFIX = "lora."  # of a field of the training, in --set


@with_job
def preprocess(
    model: Annotated[str, Argument(metavar="MODEL", help="A folder or a hub id.")],
    out: Annotated[Path, Argument(metavar="OUT", help="The float folder to write.")],
    job: JobOptions,
    restart: Annotated[bool, Option("--restart", help="Start over if work is there.")] = False,
) -> None:
    """Restorative LoRA: quantize, train adapters on what is left, merge. Then quantize OUT.

    Needs the whole model in memory. This is training: say so beside every result. --calibration is
    the text of the first pass. --set takes fields of that pass, and of the training: lora.sources,
    its text, lora.steps, lora.learning_rate, lora.rank ...
    """
    try:
        from lowbit.preprocess import MARK, LoRA
        from lowbit.preprocess import preprocess as run
    except ImportError as error:
        raise ValueError(f"{error}; it is installed with: pip install 'lowbit[train]'") from error
    settings = parse_settings(job.settings or [])
    trained = {name: value for name, value in settings.items() if name.startswith(PREFIX)}
    rest = [pair for pair in job.settings or [] if not pair.strip().startswith(PREFIX)]
    of_recipe = load_recipe(job.recipe).lora if job.recipe else None
    own: dict[str, Any] = {name.removeprefix(PREFIX): value for name, value in trained.items()}
    lora = LoRA(**(of_recipe or {}) | own)
    chosen = replace(job, settings=rest).chosen(
        locate(model, job.trust_remote_code), preprocessing=True, restart=restart
    )
    screen = console()
    screen.print(f"{model} → {out}: {chosen.label}, {lora.steps:,} steps", soft_wrap=True)
    chosen.warn(screen)
    with stoppable_run(screen, "the same command continues") as progress:
        run(model, out, chosen.method, lora, chosen.calibration, progress, **dict(chosen.options))
    _say_what_it_gained(screen, read_json(out / "config.json")[MARK]["training"])
    screen.print(f"next:\n  lowbit quantize {shlex.quote(str(out))} OUT --recipe ptq161")


def _say_what_it_gained(screen: Console, training: dict[str, Any]) -> None:
    """Counted from the first pass: training begins with what was quantized."""
    before, after = training["loss_before"], training["loss_after"]
    seen = f"{training['tokens_seen']:,} tokens, packed, at rate {training['learning_rate']:g}"
    loss = f"held-out loss {before:.3f} → {after:.3f} ({change(after, before)})"
    screen.print(f"trained: {training['linears']:,} linears on {seen}: {loss}", soft_wrap=True)
    if after >= before:
        text = "warning: training did not help: lower lora.learning_rate, or take more steps"
        screen.print(text, style="yellow", soft_wrap=True)
