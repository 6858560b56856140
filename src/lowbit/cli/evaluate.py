"""lowbit eval: what quantization cost, in one table."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lowbit.checkpoint.writer import write_json
from lowbit.cli.device import device_map
from lowbit.cli.eval_tables import show_tasks, show_texts
from lowbit.cli.screen import console, counting_bar
from lowbit.cli.slice import parse_bits
from lowbit.eval import EvalOptions, Evaluation, TaskOptions
from lowbit.eval import evaluate as measure


def evaluate(  # noqa: PLR0913 (a command's options)
    model: Annotated[str, Argument(metavar="MODEL", help="What the others are compared with.")],
    others: Annotated[
        list[str] | None, Argument(metavar="[OUT]...", help="Quantized folders, or any models.")
    ] = None,
    text: Annotated[
        list[str] | None,
        Option(
            metavar="NAME|FILE", help="wikitext2, c4, ptb or a file; repeatable. none: no text."
        ),
    ] = None,
    seqlen: Annotated[int | None, Option(help="Tokens in a window.")] = None,
    per_document: Annotated[
        bool, Option("--per-document", help="Score each document by itself, from its BOS.")
    ] = False,
    limit: Annotated[int | None, Option(help="Windows (or documents) of each text.")] = None,
    reference: Annotated[
        str | None, Option(metavar="MODEL", help="Measure the KL divergence from this float model.")
    ] = None,
    tasks: Annotated[
        str | None, Option(metavar="NAME,...", help="Zero-shot tasks of lm-eval, as piqa,arc_easy.")
    ] = None,
    tasks_dir: Annotated[
        Path | None, Option(metavar="DIR", help="Take tasks from DIR/NAME/*.jsonl, not the hub.")
    ] = None,
    task_limit: Annotated[int | None, Option(help="Rows of each task.")] = None,
    few_shot: Annotated[int | None, Option(help="Solved examples before a row.  [0]")] = None,
    bits: Annotated[
        str | None,
        Option(metavar="8,4,PLAN,...", help="Run what matquant made at each of these widths."),
    ] = None,
    json: Annotated[Path | None, Option(metavar="FILE", help="Write the numbers here too.")] = None,
    device: Annotated[str, Option(metavar="cpu|cuda:N|auto")] = "auto",
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Measure perplexity, divergence, tasks and real bits per weight, and compare."""
    options = EvalOptions(
        texts=_texts(text or []),
        seqlen=seqlen,
        per_document=per_document,
        limit=limit,
        reference=reference,
        tasks=_tasks(tasks, tasks_dir, task_limit, few_shot),
        bits=() if bits is None else tuple(dict.fromkeys(map(parse_bits, bits.split(",")))),
        device_map=device_map(device),
        trust_remote_code=trust_remote_code,
    )
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise ValueError(f"--json {json}: that is a folder, or in a folder that does not exist")
    found = _measure(list(dict.fromkeys([model, *(others or [])])), options)
    if json is not None:
        write_json(json, {row.name: row.to_json() for row in found})
    screen = console()
    show_texts(screen, found)
    if found[0].tasks:
        screen.print()
        show_tasks(screen, found, tasks_dir)


def _texts(given: list[str]) -> tuple[str, ...]:
    if "none" in given and len(given) > 1:
        raise ValueError("--text none means no text at all: name no other beside it")
    return () if given == ["none"] else tuple(given or ("wikitext2",))


def _tasks(
    names: str | None, folder: Path | None, limit: int | None, few_shot: int | None
) -> TaskOptions | None:
    if names is None and folder is None:
        if limit is not None or few_shot is not None:
            raise ValueError("--task-limit and --few-shot are for --tasks or --tasks-dir")
        return None
    listed = tuple(name.strip() for name in (names or "").split(",") if name.strip())
    if names is not None and not listed:
        raise ValueError(f"--tasks {names!r} names no task")
    return TaskOptions(names=listed, folder=folder, limit=limit, few_shot=few_shot or 0)


def _measure(models: list[str], options: EvalOptions) -> list[Evaluation]:
    with counting_bar() as bar:
        task = bar.add_task("loading", total=None)

        def on_progress(name: str, done: int, of: int) -> None:
            bar.update(task, description=name, completed=done, total=of)

        return measure(models, options, on_progress)
