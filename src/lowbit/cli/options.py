"""The options of every command that runs a method: the method, its text and how the run is done."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from typer import Option

from lowbit.calibration import Calibration
from lowbit.cli.parameters import Device, TrustRemoteCode, calibration_option, meaning
from lowbit.config import explain, unknown_name
from lowbit.methods import METHODS, Method
from lowbit.models import FAMILIES, family_name
from lowbit.pipeline import RunOptions
from lowbit.recipes import Recipe, load_recipe


@dataclass(frozen=True)
class JobOptions:
    """The options of a command that has a parameter `job` and is decorated with `with_job`."""

    recipe: Annotated[
        str | None,
        Option(
            metavar="NAME|FILE",
            help="Method and settings by the name of a recipe (see lowbit recipes) or as a .yaml "
            "file. Default: none, then name a --method.",
        ),
    ] = None
    method: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help=f"Method with its default settings (see lowbit methods): {', '.join(METHODS)}. "
            "Default: that of the recipe.",
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change a field of the method (see lowbit methods NAME); repeatable. Default: as "
            "the recipe and the method have it.",
        ),
    ] = None
    calibration: Annotated[
        list[str] | None, calibration_option("that of the recipe, else wikitext2")
    ] = None
    samples: Annotated[
        int | None,
        Option(help="Windows of calibration text. Default: as the recipe has it, else 128."),
    ] = None
    seqlen: Annotated[int | None, Option(help=meaning(Calibration, "seqlen"))] = None
    seed: Annotated[int | None, Option(help=f"{meaning(Calibration, 'seed')} Default: 0.")] = None
    device: Device = "auto"
    streams: Annotated[
        str, Option(metavar="auto|memory|disk", help=meaning(RunOptions, "streams"))
    ] = "auto"
    skip: Annotated[
        list[str] | None,
        Option(metavar="PATTERN", help=f"{meaning(RunOptions, 'skip')} Repeatable. Default: none."),
    ] = None
    only: Annotated[
        list[str] | None,
        Option(
            metavar="PATTERN",
            help="Patterns of the only linears that are quantized; repeatable. Default: all are.",
        ),
    ] = None
    lm_head_bits: Annotated[
        int | None, Option(metavar="2..8", help=meaning(RunOptions, "lm_head_bits"))
    ] = None
    start_from: Annotated[
        Path | None,
        Option(metavar="MODEL", help=f"{meaning(RunOptions, 'start_from')} Default: none."),
    ] = None
    allow_float: Annotated[
        list[str] | None,
        Option(
            metavar="PATTERN",
            help=f"{meaning(RunOptions, 'allow_float')} Repeatable. Default: none.",
        ),
    ] = None
    trust_remote_code: TrustRemoteCode = False

    def chosen(self, source: Path, preprocessing: bool = False, **more: Any) -> "Chosen":
        """The method, the text and the options of a run, for the model in a folder.

        more: further fields of `RunOptions`.
        """
        settings = parse_settings(self.settings or [])
        if self.recipe and not preprocessing and load_recipe(self.recipe).lora is not None:
            raise ValueError(f"recipe {self.recipe} is for lowbit preprocess, not for quantize")
        method, text, label = choose_method(source, self.recipe, self.method, settings)
        given = {
            "sources": self.calibration or None,
            "samples": self.samples,
            "seqlen": self.seqlen,
            "seed": self.seed,
        }
        text |= {key: value for key, value in given.items() if value is not None}
        patterns = {name: tuple(getattr(self, name) or ()) for name in PATTERNS}
        same = {name: getattr(self, name) for name in SAME}
        options = RunOptions(**patterns, **same, cache=cache_folder(), recipe=label, **more)
        unread = bool(self.calibration) and not method.streams()
        return Chosen(method, Calibration(**text), options, unread)


PATTERNS = ("skip", "only", "allow_float")
SAME = ("device", "streams", "lm_head_bits", "start_from", "trust_remote_code")


@dataclass(frozen=True)
class Chosen:
    """What a command's options stand for.

    unread: whether a calibration text was named that the method does not need.
    """

    method: Method
    calibration: Calibration
    options: RunOptions
    unread: bool

    @property
    def label(self) -> str:
        return self.options.recipe or self.method.name

    def warn(self, screen: Console) -> None:
        if self.unread:
            text = f"{self.method.name} needs no calibration text: --calibration is not read"
            screen.print(text, style="yellow")


def with_job(command: Callable[..., None]) -> Callable[..., None]:
    """Puts the fields of `JobOptions` in the place of the command's parameter `job`."""
    own = inspect.signature(command).parameters
    each = {field.name: (field.type, field.default) for field in fields(JobOptions)}
    shown: dict[str, tuple[Any, Any]] = {}
    for name, parameter in own.items():
        shown |= each if name == "job" else {name: (parameter.annotation, parameter.default)}

    @wraps(command)
    def called(**given: Any) -> None:
        job = JobOptions(**{name: given.pop(name) for name in each})
        command(job=job, **given)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in shown.items()
    ]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {name: kind for name, (kind, _) in shown.items()}
    return called


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """The values of --set FIELD=VALUE, read as YAML; none and None are null too."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        field, _, value = (part.strip() for part in pair.partition("="))
        if not field or not value:
            raise ValueError(f"--set takes field=value, not {pair!r}")
        try:
            settings[field] = None if value.lower() == "none" else yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(
                f"--set {field}: {value!r} is not a number, a word or a list"
            ) from None
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
        raise ValueError("name a --recipe (see lowbit recipes) or a --method (see lowbit methods)")
    found = load_recipe(recipe)
    chosen = method_of(recipe, found, family_name(source), settings)
    changed = ", ".join(f"{field}={value}" for field, value in settings.items())
    label = f"{recipe} with {changed}" if changed else recipe
    return chosen, found.calibration.model_dump(exclude_none=True), label


def method_of(name: str, recipe: Recipe, family: str, settings: dict[str, Any]) -> Method:
    """The method of a recipe for a family of models, with some settings changed.

    Raises ValueError, with the recipe's name, for what is wrong in it.
    """
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
    """A folder for the tokens of calibration texts; None where it cannot be made."""
    folder = Path.home() / ".cache" / "lowbit" / "windows"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder
