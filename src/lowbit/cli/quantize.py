"""lowbit quantize: a recipe or a method, a calibration text and a folder to a quantized folder."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from typer import Argument, Option

from lowbit.calibration import Calibration
from lowbit.checkpoint.output import size_of
from lowbit.checkpoint.reader import read_json
from lowbit.cli.progress import RunProgress
from lowbit.cli.screen import console, shortened, size
from lowbit.config import explain, unknown_name
from lowbit.methods import METHODS, Method
from lowbit.models import FAMILIES, family_name
from lowbit.models.locate import locate
from lowbit.pipeline import RunOptions
from lowbit.pipeline import quantize as run
from lowbit.recipes import Recipe, load_recipe

INTERRUPTED = 130  # the exit status of a program that was stopped with Ctrl-C


def quantize(  # noqa: PLR0913 (a command's options)
    model: Annotated[str, Argument(metavar="MODEL", help="A folder or a hub id.")],
    out: Annotated[Path, Argument(metavar="OUT", help="The folder to write.")],
    recipe: Annotated[
        str | None, Option(metavar="NAME|FILE", help="Settings by name; see: lowbit recipes.")
    ] = None,
    method: Annotated[
        str | None, Option(metavar="NAME", help=f"Instead of a recipe: {', '.join(METHODS)}.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="FIELD=VALUE", help="Change a field of the method; repeatable."),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        Option(metavar="NAME|FILE", help="wikitext2, c4, ptb, pile, mix or a file; repeatable."),
    ] = None,
    samples: Annotated[int | None, Option(help="Windows of calibration text.")] = None,
    seqlen: Annotated[int | None, Option(help="Tokens in a window.")] = None,
    seed: Annotated[int | None, Option(help="Of all random choices.")] = None,
    device: Annotated[str, Option(metavar="cpu|cuda:N|auto")] = "auto",
    restart: Annotated[bool, Option("--restart", help="Start over if OUT holds a run.")] = False,
    streams: Annotated[
        str, Option(metavar="auto|memory|disk", help="Where hidden states are kept.")
    ] = "auto",
    skip: Annotated[
        list[str] | None,
        Option(metavar="PATTERN", help="Linears that stay float: down_proj, layers.0.*."),
    ] = None,
    only: Annotated[
        list[str] | None,
        Option(metavar="PATTERN", help="All others stay float."),
    ] = None,
    lm_head_bits: Annotated[
        int | None, Option(metavar="2..8", help="Quantize the output layer too; 8 costs little.")
    ] = None,
    start_from: Annotated[
        Path | None,
        Option(metavar="OUT", help="Begin with what a run learned; --set epochs=0 replays it."),
    ] = None,
    allow_float: Annotated[
        list[str] | None,
        Option(metavar="PATTERN", help="Matrices that no table knows and that may stay float."),
    ] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Make a smaller model. Stopped at any moment, the same command continues."""
    source = locate(model, trust_remote_code)
    chosen, text, label = choose_method(source, recipe, method, parse_settings(settings or []))
    given = {"sources": calibration or None, "samples": samples, "seqlen": seqlen, "seed": seed}
    text |= {key: value for key, value in given.items() if value is not None}
    options = RunOptions(
        device=device,
        restart=restart,
        streams=streams,
        skip=tuple(skip or ()),
        only=tuple(only or ()),
        lm_head_bits=lm_head_bits,
        start_from=start_from,
        allow_float=tuple(allow_float or ()),
        trust_remote_code=trust_remote_code,
        cache=cache_folder(),
        recipe=label,
    )
    screen = console()
    screen.print(f"{model} → {out}: {label or chosen.name}", soft_wrap=True)
    if calibration and not chosen.streams():
        screen.print(f"{chosen.name} needs no calibration text: it is not read", style="yellow")
    try:
        with RunProgress(screen) as progress:
            run(model, out, chosen, Calibration(**text), progress, **dict(options))
    except KeyboardInterrupt:
        same = "the same command without --restart" if restart else "the same command"
        screen.print(f"stopped: finished blocks are kept, {same} continues")
        raise typer.Exit(INTERRUPTED) from None
    if progress.finished_before:
        screen.print(f"{out} was finished by an earlier run; --restart does it again")
    _summary(screen, model, source, out)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """--set field=value, the value as YAML reads it; none is null too."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        field, _, value = (part.strip() for part in pair.partition("="))
        if not field or not value:
            raise ValueError(f"--set takes field=value, not {pair!r}")
        try:
            settings[field] = None if value.lower() == "none" else yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {field}: {value!r} is no number, word or list") from None
    return settings


def choose_method(
    source: Path, recipe: str | None, method: str | None, settings: dict[str, Any]
) -> tuple[Method, dict[str, Any], str | None]:
    """The method, the recipe's calibration, and the recipe's name with what was changed in it."""
    if method and not recipe:
        if method not in METHODS:
            raise ValueError(unknown_name(method, METHODS, "method"))
        return METHODS[method](**settings), {}, None
    if not recipe or method:
        raise ValueError("name either a --recipe (see: lowbit recipes) or a --method")
    found = load_recipe(recipe)
    chosen = _of_recipe(recipe, found, family_name(source), settings)
    changed = ", ".join(f"{field}={value}" for field, value in settings.items())
    label = f"{recipe} with {changed}" if changed else recipe
    return chosen, found.calibration.model_dump(exclude_none=True), label


def _of_recipe(name: str, recipe: Recipe, family: str, settings: dict[str, Any]) -> Method:
    families = {known.name for known in FAMILIES.values()} | {"discovered"}
    for given in recipe.families:
        if given not in families:
            raise ValueError(f"recipe {name}: {unknown_name(given, families, 'family')}")
    if recipe.method not in METHODS:
        raise ValueError(f"recipe {name}: {unknown_name(recipe.method, METHODS, 'method')}")
    try:
        return METHODS[recipe.method](**recipe.settings(family) | settings)
    except ValidationError as error:
        raise ValueError(f"recipe {name}: {explain(error)}") from None


def cache_folder() -> Path | None:
    """A folder for token windows, if there can be one; a run does without it too."""
    folder = Path.home() / ".cache" / "lowbit" / "windows"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def _summary(screen: Console, model: str, source: Path, out: Path) -> None:
    before, after = size_of(source), size_of(out)
    bits = f"{after.linears:.2f} bits per weight in the linears, {after.model:.2f} in the model"
    screen.print(
        f"{out}: {bits}, {size(after.bytes)} (was {size(before.bytes)})",
        style="bold",
        soft_wrap=True,
    )
    report = read_json(out / "report.json")
    for what, names in (("gave up", report["given_up"]), ("left float", report["left_float"])):
        if names:
            line = (
                f"{what}: {len(names)} layers, in {out / 'report.json'}: {shortened(list(names))}"
            )
            screen.print(line, style="yellow", soft_wrap=True)
    float_model, folder = shlex.quote(model), shlex.quote(str(out))
    commands = (
        f"eval {float_model} {folder}",
        f"generate {folder} 'Once upon a time'",
        f"inspect {folder}",
    )
    lines = "".join(f"\n  lowbit {command}" for command in commands)
    screen.print(f"next:{lines}", style="dim", soft_wrap=True)
